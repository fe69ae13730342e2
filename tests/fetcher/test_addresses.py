"""Which addresses are ours or near."""

import pytest

from magnetar.fetcher.torrent.addresses import is_local, own_interfaces


def test_listens_only_where_the_peers_are() -> None:
    assert own_interfaces([("127.0.0.1", 5), ("127.0.0.1", 6)], reaches_out=False) == "127.0.0.1:0"
    assert "0.0.0.0" not in own_interfaces([], reaches_out=True)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("192.168.1.2", True), ("fe80::1", True), ("8.8.8.8", False)],
)
def test_knows_local_addresses(address: str, expected: bool) -> None:
    assert is_local(address) is expected
