"""What is kept of who was asked, for messages."""

from magnetar.fetcher.torrent.contacts import MAX_SEEN, Contacts
from magnetar.fetcher.torrent.events import PeerConnected


def test_keeps_a_bounded_number_of_peers_and_says_so() -> None:
    contacts = Contacts(trackers=(), peers=("10.0.0.1:1",), dht=False)
    for port in range(1, MAX_SEEN):
        contacts.note(PeerConnected(("10.0.0.1", port)))
    assert f"; {MAX_SEEN - 1} peers seen" in contacts.asked()
    for port in range(MAX_SEEN, 3 * MAX_SEEN):
        contacts.note(PeerConnected(("10.0.0.1", port)))
    assert f"; at least {MAX_SEEN} peers seen" in contacts.asked()
