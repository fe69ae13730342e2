import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.torrent.inside import is_inside


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "router",
        "LOCALHOST.",
        "nas.local",
        "fritz.box.lan",
        "metadata.internal",
        "127.0.0.1",
        "10.0.0.7",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "[::1]",
        "[::]",
        "[fd00::1]",
        "[fe80::1]",
        "[::ffff:10.0.0.7]",
    ],
)
def test_knows_its_own_network_however_it_is_written(host: str) -> None:
    assert is_inside(f"http://{host}:8080/announce?x=1")


@pytest.mark.parametrize(
    "host",
    [
        "tracker.openbittorrent.com",
        "local.example.com",
        "10.example.com",
        "8.8.8.8",
        "172.32.0.1",
        "100.128.0.1",
        "134744072",
        "[2001:4860::8888]",
    ],
)
def test_leaves_the_rest_of_the_world_alone(host: str) -> None:
    assert not is_inside(f"udp://{host}:1337/announce")


@given(st.ip_addresses(v=4))
def test_every_way_to_write_an_address_is_judged_alike(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    forms = (str(address), str(number), hex(number), f"[::ffff:{address}]")

    assert len({is_inside(f"http://{form}/") for form in forms}) == 1
    if address.is_loopback or address.is_link_local:
        assert is_inside(f"http://{address}/")
