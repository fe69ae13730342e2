"""What went between a node and its peers adds up, though peers come and go."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.torrent.session import PeerView
from magnetar.fetcher.torrent.traffic import MAX_PEERS, Traffic, TrafficLog, added

INSIDE, OUTSIDE = "10.0.0.1", "192.0.2.1"


def peer(host: str, port: int = 1, *, received: int = 0, sent: int = 0) -> PeerView:
    return PeerView(
        has_needed=True,
        chokes_us=False,
        address=(host, port),
        client="x",
        received_bytes=received,
        sent_bytes=sent,
        received_bytes_per_s=received / 10,
    )


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=4), max_size=5))
def test_a_peer_that_comes_back_counts_from_zero_and_loses_nothing(
    connections: list[list[int]],
) -> None:
    log, total = TrafficLog(), 0
    for amounts in connections:
        for amount in (amounts := sorted(amounts)):
            log.note([peer(INSIDE, received=amount), peer(OUTSIDE, received=7)], {INSIDE})
        log.note([], {INSIDE})
        total += amounts[-1]
    assert log.reading(received_bytes=10**9, sent_bytes=0).lan_received_bytes == total


def test_inside_and_outside_are_told_apart() -> None:
    log = TrafficLog()
    log.note([peer(INSIDE, received=60, sent=4), peer(OUTSIDE, received=30)], {INSIDE})
    told = log.reading(received_bytes=100, sent_bytes=5).to_json()
    assert (told["lan_received_bytes"], told["wan_received_bytes"]) == (60, 40)
    assert (told["lan_sent_bytes"], told["wan_sent_bytes"]) == (4, 1)
    assert [(each["address"], each["side"]) for each in told["peers"]] == [
        (f"{INSIDE}:1", "lan"),
        (f"{OUTSIDE}:1", "wan"),
    ]
    assert log.rates() == (6.0, 3.0)


def test_of_many_peers_the_busiest_are_shown_and_all_bans_counted() -> None:
    log = TrafficLog()
    log.note([peer(OUTSIDE, port, received=port) for port in range(1, 200)], ())
    for number in range(100):
        log.note_ban(f"{OUTSIDE}:{number}")
    told = log.reading(received_bytes=0, sent_bytes=0)
    assert [each.received_bytes for each in told.peers] == list(range(199, 199 - MAX_PEERS, -1))
    assert told.num_banned == 100
    assert told.banned == tuple(f"{OUTSIDE}:{number}" for number in range(100 - MAX_PEERS, 100))


def test_several_sessions_of_a_node_are_one() -> None:
    one = Traffic(received_bytes=3, lan_received_bytes=2, banned=("a",), num_banned=1)
    both = added([one, replace(one, sent_bytes=5, lan_sent_bytes=5)])
    assert both == Traffic(
        received_bytes=6,
        sent_bytes=5,
        lan_received_bytes=4,
        lan_sent_bytes=5,
        banned=("a",),
        num_banned=2,
    )
