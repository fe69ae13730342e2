from magnetar.fetcher.torrent.caution import CALM_S, FEW_BLOCKS, SETTLED_S, STALE_S, Caution
from magnetar.fetcher.torrent.events import BadPiece, PeerBanned
from magnetar.fetcher.torrent.session import PeerView, TorrentStatus
from magnetar.tests.torrent_session import FakeTorrentSession

STEP_S = 0.1


class Scene:
    """Peers by number, each with the bad pieces that it had a part in."""

    def __init__(self) -> None:
        self.session = FakeTorrentSession()
        self.caution = Caution(self.session, 0.0)
        self.now_s = 0.0
        self.received_bytes = 0
        self.blamed = dict.fromkeys(range(4), 0)
        self.suspects: set[int] = set()

    def bad_piece(self, *peers: int) -> None:
        for peer in peers:
            self.blamed[peer] += 1
            self.suspects.add(peer)
        self.caution.note(BadPiece(0))

    def ban(self, peer: int) -> None:
        del self.blamed[peer]
        self.suspects.discard(peer)
        self.caution.note(PeerBanned(address(peer)))

    def most_blocks(self) -> int | None:
        """What each peer is asked for at a time."""
        return self.session.most_blocks

    def look(self) -> bool:
        """Whether to begin anew, which is done then."""
        self.now_s += STEP_S
        self.received_bytes += 1
        return self._look()

    def wait(self, seconds: float, *, is_idle: bool = False) -> int:
        """How often it was begun anew meanwhile."""
        count, end_s = 0, self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += STEP_S
            self.received_bytes += not is_idle
            count += self._look()
        return count

    def _look(self) -> bool:
        self.session.connected_peers = [
            PeerView(
                has_needed=True,
                chokes_us=False,
                address=address(peer),
                num_bad_pieces=num_bad,
                is_suspected=peer in self.suspects,
            )
            for peer, num_bad in self.blamed.items()
        ]
        status = TorrentStatus(
            state="active", num_peers=len(self.blamed), downloaded_bytes=self.received_bytes
        )
        if begins := self.caution.look(status, self.now_s):
            self.caution.began_afresh()
            self.blamed = dict.fromkeys(self.blamed, 0)
            self.suspects.clear()
        return begins


def address(peer: int) -> tuple[str, int]:
    return f"192.0.2.{peer}", 6881


def test_a_bad_piece_of_one_peer_alone_changes_nothing() -> None:
    scene = Scene()
    scene.bad_piece(1)
    scene.ban(1)
    assert scene.wait(1.0) == 0
    assert scene.most_blocks() is None
    assert not scene.session.barred


def test_a_bad_piece_of_several_begins_anew_with_little_under_way_until_it_is_calm() -> None:
    scene = Scene()
    scene.bad_piece(0, 1, 2)
    assert scene.look()
    assert scene.most_blocks() == FEW_BLOCKS
    scene.bad_piece(0, 1)
    assert scene.wait(CALM_S - 1) == 0
    assert scene.most_blocks() == FEW_BLOCKS
    scene.wait(2)
    assert scene.most_blocks() is None
    # Later again.
    scene.bad_piece(0, 1, 2)
    assert scene.look()


def test_who_is_shut_out_meanwhile_stays_out() -> None:
    scene = Scene()
    scene.ban(3)
    scene.bad_piece(0, 1, 2)
    assert scene.look()
    # Before, honest ones are shut out too.
    assert not scene.session.barred
    scene.bad_piece(1)
    scene.ban(1)
    assert scene.look() is False
    assert scene.session.barred == {"192.0.2.1"}


def test_all_begin_afresh_once_nobody_is_under_suspicion_any_more() -> None:
    scene = Scene()
    scene.bad_piece(0, 1)
    assert scene.look()
    scene.bad_piece(0, 1, 2)
    scene.look()
    scene.bad_piece(1)
    scene.ban(1)
    assert scene.wait(SETTLED_S + 0.5) == 0, "0 and 2 are under suspicion"
    scene.suspects.clear()
    assert scene.wait(1.0) == 1
    assert scene.wait(CALM_S + 1) == 0


def test_what_liars_began_is_freed_in_the_end_though_suspects_never_clear_themselves() -> None:
    scene = Scene()
    scene.bad_piece(0, 1)
    assert scene.look()
    scene.bad_piece(0, 1, 2)
    scene.look()
    scene.ban(1)
    assert scene.wait(CALM_S - 1) == 0
    assert scene.wait(2.0) == 1
    assert scene.wait(CALM_S + 1) == 0
    assert scene.most_blocks() is None


def test_where_nothing_comes_any_more_all_are_let_in_again() -> None:
    scene = Scene()
    scene.bad_piece(0, 1)
    assert scene.look()
    scene.bad_piece(0, 1)
    for peer in list(scene.blamed):
        scene.ban(peer)
    assert len(scene.session.barred) == 4
    assert scene.wait(STALE_S + 0.2, is_idle=True) == 1
    assert not scene.session.barred
    # There is nobody to blame for it any more.
    assert scene.wait(3 * STALE_S, is_idle=True) == 0


def test_who_was_shut_out_stays_out_while_others_bring_something() -> None:
    scene = Scene()
    scene.bad_piece(0, 1)
    assert scene.look()
    scene.bad_piece(1)
    scene.ban(1)
    scene.wait(1)
    assert scene.wait(STALE_S + 0.2, is_idle=True) == 1
    assert scene.session.barred == {"192.0.2.1"}
    scene.bad_piece(0, 2)
    assert scene.wait(STALE_S + 0.2, is_idle=True) == 1
    assert not scene.session.barred


def test_nothing_is_begun_anew_where_nobody_lied() -> None:
    assert Scene().wait(10 * STALE_S, is_idle=True) == 0
