"""What works for a deployment on one node: measures it and brings the release there."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from ...errors import InterruptedByUserError, MagnetarError
from ...fetcher.checkpoint.checked_files import LoadChecks
from ...fetcher.checkpoint.release import facts_to_json
from ...fetcher.config import ReleaseHints
from ...fetcher.division import Standing
from ...fetcher.fetch import Fetch
from ...fetcher.ownership import Member, Role
from ...fetcher.piece_map import ByteRange
from ...fetcher.progress import Progress
from ...fetcher.store import ReleaseFolder, Store
from ...fetcher.torrent.lending import Lender, Lending
from ...fetcher.torrent.traffic import Traffic, added
from ..inventory.inventory import probe_node
from ..machines import Node
from ..spec import SourceSpec
from .progress_board import ProgressBoard
from .source_fetch import fetch_of
from .status import FetchedShare

T = TypeVar("T")
TEND_S: Final = 1.0

logger = logging.getLogger(__name__)


class NodeAgent:
    """Runs as a threaded Ray actor, one for each node and deployment.

    Methods block until their work is done; `progress`, `stop` and what stages ask answer
    meanwhile. Everything else runs in one thread of its own. Errors are `MagnetarError`s.
    """

    def __init__(
        self,
        *,
        host: str,
        address: str,
        store: str,
        memory_limit_bytes: int | None = None,
        cpu_limit: int | None = None,
        shares_lan: bool = False,
        deployment: str = "",
    ) -> None:
        """`shares_lan`: other nodes may fetch the same release, and find this one at `address`.
        `deployment` is the name of the one that it works for.
        """
        self._host = host
        self._address = address
        self._store = Path(store.replace("{host}", host)).expanduser()
        self._memory_limit_bytes = memory_limit_bytes
        self._cpu_limit = cpu_limit
        self._lan_address = address if shares_lan else None
        self._who = f"deployment {deployment}" if deployment else ""
        self._board = ProgressBoard()
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")
        self._fetch: Fetch | None = None
        self._source: SourceSpec | None = None
        self._ranges: tuple[ByteRange, ...] | None = None
        self._is_verified = False
        self._kept: LoadChecks | None = None
        """Of a release that is there, after its fetch has ended."""
        self._used: ReleaseFolder | None = None
        self._has_metadata = False
        self._lendings: dict[str, Lending] = {}
        self._lending_lock = threading.Lock()
        self._past = Traffic()
        self._is_over = threading.Event()
        self._tending = threading.Thread(target=self._tend, name="tend", daemon=True)
        self._tending.start()

    def inventory(self, info_hash: str | None) -> Node:
        """This machine, with the bytes that its store holds of the release."""
        node = probe_node(
            self._host,
            self._address,
            self._store,
            memory_limit_bytes=self._memory_limit_bytes,
            cpu_limit=self._cpu_limit,
        )
        return replace(node, held_bytes=Store(self._store).held_bytes(info_hash))

    def identify(self, source: SourceSpec) -> str | None:
        """The info-hash of a release, which nobody is asked for; None for a plain folder."""
        return self._run(lambda: self._fetch_of(source).identify())

    def metadata(
        self,
        source: SourceSpec,
        torrent: bytes | None = None,
        lenders: tuple[Lender, ...] = (),
        *,
        waits: bool = False,
    ) -> str | None:
        """Learn what the release consists of; its info-hash, None for a plain folder.

        `torrent` is what the agent of another node found. `lenders` are asked before anybody
        outside. `waits` is as of `Fetch.metadata`.
        """

        def work() -> str | None:
            self._source = source
            fetch = self._fetch_of(source)
            if not self._has_metadata:
                if torrent is not None:
                    fetch.adopt(torrent)
                if lenders:
                    fetch.borrow(lenders, lan_address=self._address)
                fetch.metadata(waits=waits)
                if self._used is None and fetch.info_hash is not None:
                    self._used = Store(self._store).release_folder(fetch.info_hash)
                    self._used.use()
                self._has_metadata = True
            return fetch.info_hash

        return self._run(work)

    def torrent(self) -> bytes | None:
        """The .torrent, for agents of other nodes; None for a plain folder. After `metadata`."""

        def work() -> bytes | None:
            metainfo = self._started().metadata()
            return None if metainfo is None else metainfo.raw

        return self._run(work)

    def facts(self, given: ReleaseHints, known: ReleaseHints) -> str:
        """The release's facts as JSON, from the heads and tails of its files. After `metadata`."""
        return self._run(lambda: facts_to_json(self._started().facts(given=given, known=known)))

    def look(self, source: SourceSpec) -> tuple[str, str | None] | None:
        """Facts as JSON and info-hash of a release, from this node's store alone; else None."""

        def work() -> tuple[str, str | None] | None:
            fetch = self._fetch_of(source)
            found = fetch.look(given=source.given, known=source.known)
            return None if found is None else (facts_to_json(found.facts), fetch.info_hash)

        return self._run(work)

    def restrict(self, ranges: tuple[ByteRange, ...] | None) -> None:
        """Want these bytes of the weights alone, or the whole release. After `metadata`."""

        def work() -> None:
            self._ranges = ranges
            self._started().restrict(ranges)

        self._run(work)

    def order(self, steps: tuple[tuple[ByteRange, ...], ...]) -> None:
        """Bring the bytes of each step before those of the next. After `metadata`."""
        self._run(lambda: self._started().order(steps))

    def folder(self) -> str:
        """The release folder on this node, which `download` fills. After `metadata`."""
        return self._run(lambda: str(self._started().folder()))

    def wait(self, ranges: tuple[ByteRange, ...], timeout_s: float) -> bool:
        """Whether these bytes may be read, now or within the time. After `folder`.

        This and the next three answer also after `end_fetch`, for whoever loads again what is
        there.
        """
        return self._kept is not None or self._running().wait(ranges, timeout_s)

    def load_checks(self) -> LoadChecks:
        """What tensors can be checked against as they are loaded. After `folder`."""
        return self._kept or self._running().load_checks()

    def keep_sums(self, sums: Mapping[ByteRange, str]) -> None:
        """Remember SHA-256 of tensors for the next time. After `folder`."""
        if (kept := self._kept) is not None:
            self._kept = replace(kept, manifest=kept.manifest.merged(sums))
        else:
            self._running().keep_sums(sums)

    def mend(self, part: ByteRange) -> None:
        """Check the pieces of these bytes again and fetch bad ones anew; also during `download`."""
        if self._kept is not None:
            self._run(lambda: self._mend_again(part))
        elif not self._running().mend_meanwhile(part):
            self._run(lambda: self._started().mend(part))

    def check_disk(self) -> None:
        """Raise DiskSpaceError where the rest of what is wanted does not fit. After `metadata`."""
        self._run(lambda: self._started().check_disk())

    def join(self) -> Member | None:
        """Open the torrent to the other nodes; None for a plain folder. After `restrict`."""
        return self._run(lambda: self._started().join())

    def share(self, role: Role) -> None:
        """Divide the download with the other nodes, also in the middle of it. After `join`."""
        self._started().share(role)

    def member(self) -> Member | None:
        """As `join`, as things are now; answers also during `download`. After `join`."""
        return self._started().member()

    def standing(self) -> Standing | None:
        """How far the role is; answers also during `download`. After `join`."""
        return self._started().standing()

    def download(self) -> None:
        """Bring all that is wanted; `wait` tells meanwhile what is there. After `metadata`."""
        self._run(lambda: self._started().download())

    def verify(self) -> None:
        """Check the release's own checksums. After `download`."""

        def work() -> None:
            self._started().verify()
            self._is_verified = True

        self._run(work)

    def fetched(self) -> FetchedShare:
        """What was brought to this node. After `metadata`."""

        def work() -> FetchedShare:
            fetch = self._started()
            fetch.count()
            return FetchedShare(
                host=self._host,
                wanted_bytes=fetch.wanted_bytes,
                received_bytes=fetch.received_bytes,
                sent_bytes=fetch.sent_bytes,
            )

        return self._run(work)

    def end_fetch(self) -> None:
        """End the fetch and keep what resumes it; fine if there is none."""

        self._run(self._close_fetch)

    def lend(self, info_hash: str, to: tuple[str, ...]) -> Lender | None:
        """Let nodes with these addresses have what this node's store holds of a release.

        While this agent fetches it with others, also what it is bringing. None where it holds
        nothing that is known to be right.
        """
        with self._lending_lock:
            if self._stop.is_set():
                return None
            fetch = self._fetch
            if fetch is not None and fetch.info_hash == info_hash:
                return fetch.lend(to)
            lending = self._lendings.get(info_hash)
            if lending is None or not lending.is_current():
                place = Store(self._store).release_folder(info_hash)
                newer = Lending.open(place, host=self._host, address=self._address)
                if newer is not None:
                    if lending is not None:
                        lending.close()
                        self._past = added((self._past, replace(lending.traffic, peers=())))
                    lending = self._lendings[info_hash] = newer
            if lending is None:
                return None
            lending.admit(to)
            return lending.lender

    def traffic(self) -> dict[str, Any]:
        """What went between this node and its peers so far, by peer and in all, as JSON types."""
        fetch, lendings = self._fetch, tuple(self._lendings.values())
        parts = [self._past, *(lending.traffic for lending in lendings)]
        if fetch is not None:
            parts.append(fetch.traffic)
        return {"host": self._host} | added(parts).to_json()

    def close(self) -> None:
        """End the fetch as `end_fetch` does, and all that is lent; the release may go then."""
        try:
            self.end_fetch()
        finally:
            self._is_over.set()
            if self._used is not None:
                self._used.end_use()
            with self._lending_lock:
                for lending in self._lendings.values():
                    lending.close()
                self._lendings.clear()
            self._tending.join()

    def stop(self) -> None:
        """Make the method that is running raise InterruptedByUserError, and all later ones."""
        self._stop.set()

    def progress(self, cursor: int) -> tuple[tuple[Progress, ...], int]:
        """What is new since `cursor`, and the next cursor."""
        return self._board.since(cursor)

    def _close_fetch(self) -> None:
        fetch = self._fetch
        if fetch is None:
            return
        if self._is_verified:  # before the fetch is gone, for some may be asking
            self._kept = fetch.load_checks()
        self._fetch = None
        self._has_metadata = False
        fetch.close()
        self._past = added((self._past, fetch.traffic))

    def _mend_again(self, part: ByteRange) -> None:
        """After the fetch has ended: with another one, for as long as it takes."""
        assert self._source is not None
        try:
            fetch = self._fetch_of(self._source)
            fetch.restrict(self._ranges)
            fetch.mend(part)
        finally:
            self._close_fetch()

    def _fetch_of(self, source: SourceSpec) -> Fetch:
        if self._fetch is None:
            self._fetch = fetch_of(
                source,
                self._store,
                on_progress=self._publish,
                stop=self._stop,
                node=self._host,
                lan_address=self._lan_address,
                who=self._who,
            )
        return self._fetch

    def _tend(self) -> None:
        """What peers do while no method runs is heard too, so that no queue grows."""

        def work() -> None:
            if self._fetch is not None:
                self._fetch.tend()

        while not self._is_over.wait(TEND_S):
            try:
                self._run(work)
            except MagnetarError as error:
                logger.warning("%s: %s", self._host, error)

    def _publish(self, progress: Progress) -> None:
        self._board.publish(replace(progress, node=self._host))

    def _run(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def _running(self) -> Fetch:
        """For any thread."""
        if (fetch := self._fetch) is None:
            raise InterruptedByUserError("the download has ended")
        return fetch

    def _started(self) -> Fetch:
        assert self._fetch is not None, "metadata comes first"
        return self._fetch
