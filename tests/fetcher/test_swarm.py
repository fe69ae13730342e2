import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from magnetar.errors import DownloadError, InterruptedByUserError, TimedOutError
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent.contacts import Contacts
from magnetar.fetcher.torrent.disk_room import RESERVE_BYTES
from magnetar.fetcher.torrent.events import (
    Checked,
    Flushed,
    MetadataArrived,
    PeerLost,
    StorageFailed,
    TrackerFailed,
)
from magnetar.fetcher.torrent.metainfo import Metainfo
from magnetar.fetcher.torrent.reporting import STALL_S
from magnetar.fetcher.torrent.session import PeerView, TorrentJob, TorrentStatus
from magnetar.fetcher.torrent.swarm import RESUME_S, Swarm
from magnetar.fetcher.torrent.write_out import WRITE_OUT_S
from magnetar.fetcher.waves import Waves
from magnetar.tests.torrent_session import FakeTorrentSession

METAINFO = Metainfo(
    info_hash="a" * 40,
    info_hashes=("a" * 40,),
    name="tiny",
    files=(),
    piece_length=16_384,
    num_pieces=2,
    total_bytes=20_000,
    raw=b"",
)
JOB = TorrentJob(info_hash="a" * 40, save_path=Path("unused"))
JOB_WITH_FILES = replace(JOB, metainfo=METAINFO)
PEER = ("127.0.0.1", 6881)
MOVING = TorrentStatus(state="active", have=(False, False), wanted_bytes=100)


class Scene:
    """A swarm over a fake session whose reading `play` changes as time passes."""

    def __init__(self, *, timeout_s: float | None = None) -> None:
        self.session = FakeTorrentSession()
        self.stop = threading.Event()
        self.told: list[Progress] = []
        self.resume_data: list[bytes] = []
        self.readable: list[tuple[float, tuple[bool, ...]]] = []
        self.free_bytes = 1 << 40
        self.swarm = Swarm(
            session=self.session,
            contacts=Contacts(
                trackers=("udp://tracker.example:1",), peers=("127.0.0.1:6881",), dht=False
            ),
            named_peers=(PEER,),
            timeout_s=timeout_s,
            on_progress=self.told.append,
            on_resume_data=self.resume_data.append,
            on_readable=lambda have: self.readable.append((self.session.now_s, tuple(have))),
            stop=self.stop,
            node="n1",
            clock=self.session.clock,
            free_bytes=lambda folder: self.free_bytes,
        )

    def play(self, step: Callable[[FakeTorrentSession], None]) -> None:
        self.session.script = step

    def fetch(self) -> TorrentStatus:
        return self.swarm.fetch(Waves.of({0}), phase="download", doing="tiny")

    def messages(self) -> str:
        return "\n".join(progress.message for progress in self.told)


def test_returns_once_the_wanted_pieces_are_there() -> None:
    scene = Scene()

    def arrive(session: FakeTorrentSession) -> None:
        session.reading = replace(MOVING, have=(session.now_s > 3, False))

    scene.play(arrive)
    assert scene.fetch().have == (True, False)
    assert 3 < scene.session.now_s < 4
    assert {progress.message for progress in scene.told} == {"tiny"}
    assert {progress.node for progress in scene.told} == {"n1"}


def test_the_first_wave_that_lacks_a_piece_has_the_highest_priority() -> None:
    scene = Scene()
    waves = Waves.of({3}, {0, 1}, {2})

    def arrive(session: FakeTorrentSession) -> None:
        there = {piece for piece, at_s in ((1, 1), (3, 2), (0, 3), (2, 4)) if session.now_s > at_s}
        have = tuple(piece in there for piece in range(5))
        session.reading = replace(MOVING, have=have)

    scene.play(arrive)
    scene.swarm.fetch(waves, phase="download", doing="tiny")
    assert scene.session.priorities == [
        [6, 6, 5, 7, 0],
        [7, 7, 6, 7, 0],
        [7, 7, 7, 7, 0],
        [7, 7, 7, 7, 0],
    ]


def test_pieces_are_readable_once_they_were_written_and_not_before() -> None:
    scene = Scene()

    def arrive(session: FakeTorrentSession) -> None:
        session.reading = replace(MOVING, have=(session.now_s > 1, session.now_s > 4))
        # The disk takes two seconds for what it was asked to write.
        while session.flushes and session.flushes[0] + 2 <= session.now_s:
            session.flushes.pop(0)
            session.events.append(Flushed())

    scene.session.answers_flush = False
    scene.play(arrive)
    scene.swarm.fetch(Waves.of({0, 1}), phase="download", doing="tiny")
    first = next(at_s for at_s, have in scene.readable if have[0])
    assert 3 <= first < 3 + 2 + WRITE_OUT_S
    last_s, last = scene.readable[-1]
    assert last == (True, True)
    assert last_s >= 6
    assert all(not have[1] for at_s, have in scene.readable if at_s < 6)


@pytest.mark.parametrize(
    ("reading", "peers", "cause"),
    [
        (MOVING, [], "no peers"),
        (replace(MOVING, is_paused=True), [], "paused"),
        (
            MOVING,
            [PeerView(has_needed=False, chokes_us=True)] * 2,
            "2 peers connected, none has the pieces we need",
        ),
        (MOVING, [PeerView(has_needed=True, chokes_us=True)], "none lets us download yet"),
        (MOVING, [PeerView(has_needed=True, chokes_us=False)], "1 peer connected, nothing arrives"),
    ],
)
def test_says_why_nothing_arrives(
    reading: TorrentStatus, peers: list[PeerView], cause: str
) -> None:
    scene = Scene(timeout_s=STALL_S + 3)
    scene.session.reading = reading
    scene.session.connected_peers = peers
    with pytest.raises(TimedOutError, match=cause):
        scene.fetch()
    early = [p for p in scene.told if p.message == "tiny"]
    assert early
    assert cause in scene.told[-1].message
    assert "nothing for" in scene.told[-1].message


def test_a_timeout_counts_from_the_last_byte() -> None:
    scene = Scene(timeout_s=10)

    def arrive(session: FakeTorrentSession) -> None:
        session.reading = replace(MOVING, downloaded_bytes=min(int(session.now_s), 30))

    scene.play(arrive)
    with pytest.raises(TimedOutError, match="within 10 s"):
        scene.fetch()
    assert 39 < scene.session.now_s < 42


def test_no_metadata_names_trackers_peers_and_the_last_error() -> None:
    scene = Scene(timeout_s=2)
    scene.session.reading = TorrentStatus(state="metadata")
    scene.session.events += [
        TrackerFailed("udp://tracker.example:1", "Host not found"),
        PeerLost(PEER, "Connection refused"),
    ]
    with pytest.raises(TimedOutError) as caught:
        scene.swarm.fetch_metadata(JOB)
    message = str(caught.value)
    for part in (
        "metadata",
        "2 s",
        "udp://tracker.example:1 (host not found)",
        "peer 127.0.0.1:6881",
        "0 peers seen",
        "last error: peer 127.0.0.1:6881: connection refused",
        "--peer",
    ):
        assert part in message
    assert "no peers" in scene.messages()


def test_metadata_is_returned_and_the_torrent_removed() -> None:
    scene = Scene(timeout_s=2)
    scene.session.events.append(MetadataArrived(b"info"))
    assert scene.swarm.fetch_metadata(JOB) == b"info"
    assert [job.metainfo for job in scene.session.jobs] == [None]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (StorageFailed("/store/weights.bin", "No space left", True), "disk is full at weights"),
        (StorageFailed("", "Input/output error", False), "disk failed: Input/output error"),
    ],
)
def test_a_failing_disk_ends_it_with_the_reason(event: StorageFailed, said: str) -> None:
    scene = Scene()
    scene.session.reading = MOVING
    scene.session.events.append(event)
    with pytest.raises(DownloadError, match=said):
        scene.fetch()


def test_a_full_disk_pauses_it_until_there_is_room() -> None:
    scene = Scene(timeout_s=4)
    scene.session.reading = replace(MOVING, wanted_done_bytes=40)
    scene.swarm.add(JOB_WITH_FILES)
    scene.free_bytes = 30
    scene.session.events.append(StorageFailed("/store/weights.bin", "No space left", True))

    def play(session: FakeTorrentSession) -> None:
        if session.now_s > 20:
            scene.free_bytes = 60
        there = session.now_s > 30
        session.reading = replace(MOVING, have=(there, False), wanted_done_bytes=40 + 60 * there)
        if session.now_s < 20 and not session.is_held and session.now_s > 1:
            session.events.append(StorageFailed("", "No space left", True))

    scene.play(play)
    with pytest.raises(TimedOutError):  # Of waiting for room no time counts, afterwards it does.
        scene.fetch()
    assert 24 < scene.session.now_s < 26
    assert scene.session.rechecks_s
    assert 20 < scene.session.rechecks_s[0] < 22
    assert (
        "paused: 0.0 MB are to come and 0.0 MB are free; make room on the disk" in scene.messages()
    )


def test_it_pauses_before_the_disk_is_full() -> None:
    scene = Scene()
    missing = 3 * RESERVE_BYTES
    reading = replace(MOVING, wanted_bytes=missing)
    scene.session.reading = reading
    scene.swarm.add(JOB_WITH_FILES)
    held: list[tuple[float, bool]] = []

    def play(session: FakeTorrentSession) -> None:
        held.append((session.now_s, session.is_held))
        scene.free_bytes = RESERVE_BYTES - 1 if 5 < session.now_s < 15 else missing
        session.reading = replace(reading, have=(session.now_s > 20, False))

    scene.play(play)
    scene.fetch()
    assert {is_held for now_s, is_held in held if now_s < 5 or now_s > 16.5} == {False}
    assert {is_held for now_s, is_held in held if 6.5 < now_s < 15} == {True}
    assert scene.session.rechecks_s == []


def test_stop_ends_it_at_once() -> None:
    scene = Scene()
    scene.session.reading = MOVING

    def press(session: FakeTorrentSession) -> None:
        if session.now_s > 1:
            scene.stop.set()

    scene.play(press)
    with pytest.raises(InterruptedByUserError, match="what arrived is kept"):
        scene.fetch()
    assert scene.session.now_s < 1.5


def test_asks_named_peers_again_and_keeps_resume_data_while_it_lasts() -> None:
    scene = Scene(timeout_s=3 * RESUME_S)
    scene.session.reading = MOVING
    scene.session.events.append(Checked())
    scene.swarm.add(JOB)
    with pytest.raises(TimedOutError):
        scene.fetch()
    assert scene.session.connects[0][1] == (PEER,)
    assert len(scene.session.connects) > 10
    assert 2 <= len(scene.session.resumes_s) <= 3
    assert set(scene.resume_data) == {b"resume"}


def test_counts_bytes_over_removed_torrents() -> None:
    scene = Scene()
    scene.session.reading = replace(MOVING, downloaded_bytes=7)
    scene.swarm.remove()
    scene.session.reading = replace(MOVING, downloaded_bytes=5)
    assert scene.swarm.meter.received_bytes == 12
