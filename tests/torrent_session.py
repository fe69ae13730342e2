"""A `TorrentSession` without a network: tests say what it has and what happens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from magnetar.fetcher.torrent.addresses import Address
from magnetar.fetcher.torrent.events import Checked, Event, Flushed, Removed, ResumeData
from magnetar.fetcher.torrent.session import PeerView, TorrentJob, TorrentStatus


@dataclass(kw_only=True)
class FakeTorrentSession:
    """Time passes only in `poll`; `script` is called there with the fake before each return."""

    script: Callable[["FakeTorrentSession"], None] = lambda session: None
    now_s: float = 0.0
    reading: TorrentStatus | None = None
    connected_peers: list[PeerView] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    jobs: list[TorrentJob] = field(default_factory=list)
    connects: list[tuple[float, tuple[Address, ...]]] = field(default_factory=list)
    resumes_s: list[float] = field(default_factory=list)
    priorities: list[list[int]] = field(default_factory=list)
    flushes: list[float] = field(default_factory=list)
    answers_flush: bool = True
    rechecks_s: list[float] = field(default_factory=list)
    begun_afresh_s: list[float] = field(default_factory=list)
    barred: frozenset[str] = frozenset()
    most_blocks: int | None = None
    is_held: bool = False
    is_closed: bool = False

    def clock(self) -> float:
        """The fake's time in seconds."""
        return self.now_s

    def add(self, job: TorrentJob) -> None:
        self.jobs.append(job)
        if job.metainfo is not None:
            self.events.append(Checked())

    def poll(self, timeout_s: float) -> list[Event]:
        self.now_s += timeout_s
        self.script(self)
        events, self.events = self.events, []
        return events

    def status(self) -> TorrentStatus | None:
        return self.reading

    def peers(self) -> list[PeerView]:
        return self.connected_peers

    def begun(self) -> frozenset[int]:
        return frozenset()

    def connect(self, peers: Iterable[Address]) -> None:
        self.connects.append((self.now_s, tuple(peers)))

    def only(self, hosts: Iterable[str] | None) -> None: ...

    def bar(self, hosts: Iterable[str]) -> None:
        self.barred = frozenset(hosts)

    def ask_at_most(self, num_blocks: int | None) -> None:
        self.most_blocks = num_blocks

    def reach_out(self, wanted: bool) -> None: ...

    def prioritize(self, priorities: Sequence[int]) -> None:
        self.priorities.append(list(priorities))

    def urge(self, pieces: Iterable[int]) -> None: ...

    def flush(self) -> None:
        self.flushes.append(self.now_s)
        if self.answers_flush:
            self.events.append(Flushed())

    def request_resume_data(self) -> None:
        self.resumes_s.append(self.now_s)
        self.events.append(ResumeData(b"resume"))

    def hold(self) -> None:
        self.is_held = True

    def go_on(self) -> None:
        self.is_held = False

    def recheck(self) -> None:
        self.rechecks_s.append(self.now_s)
        self.events.append(Checked())

    def begin_afresh(self) -> None:
        self.begun_afresh_s.append(self.now_s)
        self.events.append(Checked())

    def remove(self) -> None:
        self.events.append(Removed())

    def close(self) -> None:
        self.is_closed = True
