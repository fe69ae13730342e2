"""The files of one torrent in the store: what is there, what is known of it, fetching the rest.

A piece counts as there when libtorrent has hashed it. Between runs that knowledge lasts as resume
data, believed only while every file has the size and time that it had when the data was made;
otherwise libtorrent hashes the files again.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from urllib.parse import urlsplit

from ...errors import DownloadError, MagnetarError
from ..layout import Selection
from ..ownership import Role
from ..piece_map import PieceMap
from ..progress import Phase, ProgressSink
from ..store import Record, ReleaseFolder, fingerprints
from .contacts import Contacts, shown
from .magnet import split_peer
from .metainfo import Metainfo
from .session import (
    Address,
    SessionSettings,
    TorrentJob,
    TorrentSession,
    TorrentStatus,
    is_local,
    own_interfaces,
)
from .swarm import StalledError, Swarm

SMALL_FILE_BYTES = 16 << 20
"""Config and tokenizer files up to this size come with the first and last pieces."""

PARTNER_PATIENCE_S = 30.0
"""A partner that brings nothing for so long is given up; what it owes then comes from outside."""

logger = logging.getLogger(__name__)


class Download:
    """One torrent and its place in the store. Blocking; one thread; `close` in the end."""

    def __init__(
        self,
        *,
        place: ReleaseFolder,
        trackers: tuple[str, ...],
        web_seeds: tuple[str, ...],
        peers: tuple[str, ...],
        dht: bool,
        timeout_s: float | None,
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str,
        session_factory: Callable[[SessionSettings], TorrentSession],
        lan_address: str | None = None,
    ) -> None:
        """`lan_address` is where partners reach this node, on which it then listens too."""
        self._place = place
        self._trackers = trackers
        self._web_seeds = web_seeds
        self._peers = peers
        self._dht = dht
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._session_factory = session_factory
        self._lan_address = lan_address
        self._role: Role | None = None
        self._swarm: Swarm | None = None
        self._addresses: tuple[Address, ...] = ()
        self._metainfo: Metainfo | None = None
        self._selection: Selection | None = None
        self._share: frozenset[int] | None = None
        self._have: tuple[bool, ...] = ()
        self._is_open = False
        self._was_done = False
        self._received_bytes = 0
        self._sent_bytes = 0
        self._has_joined = False
        self.hashed_bytes = 0
        """Bytes that were read back from the disk to check their pieces."""

    @property
    def sent_bytes(self) -> int:
        """Payload that went to others, at the last reading."""
        return self._swarm.sent_bytes if self._swarm is not None else self._sent_bytes

    def count(self) -> None:
        """Makes `received_bytes` and `sent_bytes` exact; takes over a second after `join`."""
        if self._swarm is not None and self._has_joined:
            self._swarm.count()

    @property
    def received_bytes(self) -> int:
        """Payload that came over the network."""
        return self._swarm.received_bytes if self._swarm is not None else self._received_bytes

    def fetch_info(self) -> bytes:
        """The info dictionary from peers. Raises what `Swarm.fetch_metadata` raises."""
        return self._start().fetch_metadata(self._job())

    def choose(self, metainfo: Metainfo, selection: Selection) -> None:
        """Says which torrent this is and which of its files are wanted; needed by all below."""
        self._metainfo = metainfo
        self._selection = selection

    def restrict(self, share: frozenset[int] | None) -> None:
        """Wants only these pieces and the small files' from now on; None wants all files."""
        self._share = share

    @property
    def _torrent(self) -> Metainfo:
        assert self._metainfo is not None
        return self._metainfo

    @property
    def _chosen(self) -> Selection:
        assert self._selection is not None
        return self._selection

    def is_intact(self) -> bool:
        """All that is wanted was there and right, and no file has changed since."""
        record = self._place.record.read()
        return self._matches(record) and (record.complete or self.wanted() <= record.pieces)

    def verified(self) -> frozenset[int]:
        """Pieces in the files that had the right hashes, as far as that is on record."""
        record = self._place.record.read()
        if not self._matches(record):
            return frozenset()
        return self._file_pieces(self._chosen.wanted) if record.complete else record.pieces

    def wanted(self) -> frozenset[int]:
        """The pieces that `complete` brings."""
        if self._share is None:
            return self._file_pieces(self._chosen.wanted)
        small = set(self._chosen.wanted) - set(self._chosen.weights)
        return self._share | self._file_pieces(small)

    def partial_files(self) -> frozenset[str]:
        """Wanted files of which not every piece is on record."""
        there = self.verified()
        return frozenset(
            path for path in self._chosen.wanted if not self._file_pieces([path]) <= there
        )

    def missing_bytes(self) -> int:
        """Bytes of wanted pieces that take no room on the disk yet."""
        if self.is_intact():
            return 0
        there = fingerprints(self._place.data, self._chosen.wanted)
        if self._share is None:
            return sum(
                max(0, self._torrent.file(path).length - there[path].allocated)
                if path in there
                else self._torrent.file(path).length
                for path in self._chosen.wanted
            )
        wanted, known = self.wanted(), self.verified()
        num_bytes = self._piece_map.num_bytes
        if known:
            return num_bytes(wanted - known)
        # After a crash nobody knows which pieces take the room; what is there is counted for us.
        return max(0, num_bytes(wanted) - sum(file.allocated for file in there.values()))

    def first_look(self) -> set[int]:
        """Small files whole, and of the others the first and last piece: headers are there."""
        pieces: set[int] = set()
        for path in self._chosen.wanted:
            file = self._torrent.file(path)
            of_file = self._torrent.pieces(file)
            is_small = path not in self._chosen.weights and file.length <= SMALL_FILE_BYTES
            pieces.update(of_file if is_small else (of_file[0], of_file[-1]))
        return pieces

    def fetch_pieces(self, needed: set[int]) -> set[int]:
        """Fetches these pieces and no others; returns all that may be read from the files."""
        swarm = self._open()
        if any(not self._have[piece] for piece in needed):
            self._was_done = False  # The files change now, by our own hand.
        status = swarm.fetch(
            self._priorities(needed, level=7),
            urgent=tuple(piece for piece in sorted(needed) if not self._have[piece]),
            phase="plan",
            doing="the pieces that say what the model is",
        )
        self._have = tuple(status.have)
        return {piece for piece, is_there in enumerate(self._have) if is_there}

    def complete(self, *, phase: Phase = "download") -> None:
        """Fetches what is missing of what is wanted, and records that it is right."""
        if self.is_intact():
            return
        swarm = self._open()
        if self._was_done and not self._matches(self._place.record.read()):
            self.recheck()  # Somebody changed a file behind libtorrent's back.
        wanted = self.wanted()
        self._was_done = False
        status = self._fetch_shared(swarm, wanted, phase) or swarm.fetch(
            self._priorities(wanted), phase=phase, doing=self._torrent.name
        )
        self._have = tuple(status.have)
        swarm.save_resume_data()
        self._remember(done=True)

    def join(self) -> tuple[str, frozenset[int]]:
        """Opens the torrent for partners, even where nothing is missing.

        Returns ``HOST:PORT``, and the pieces that are there.

        Raises:
            DownloadError: no partner could connect.
        """
        swarm = self._open()
        address = swarm.address(self._lan_address)
        if address is None:
            raise DownloadError(
                f"the torrent session does not listen on {self._lan_address}: is that an address "
                "of this node?"
            )
        self._has_joined = True
        there = frozenset(piece for piece, is_there in enumerate(self._have) if is_there)
        return shown(address), there

    def share(self, role: Role) -> None:
        """Divides the work with partners from now on; after `join`."""
        self._role = role
        self._open().join(tuple(split_peer(partner) for partner in role.partners))

    def _fetch_shared(
        self, swarm: Swarm, wanted: frozenset[int], phase: Phase
    ) -> TorrentStatus | None:
        """First what is ours to bring, then what partners bring, from them alone.

        None where there are no partners, or where they do not deliver.
        """
        role, self._role = self._role, None
        if role is None or not role.borrowed & wanted:
            return None
        doing = self._torrent.name
        owned = wanted - role.borrowed
        priorities = self._priorities(owned)
        for piece in role.lent & owned:
            priorities[piece] = 7  # Somebody waits for these.
        swarm.fetch(priorities, phase=phase, doing=doing)
        self._have = tuple(swarm.verified()) or self._have
        # What is left would come from outside too, a second time (measured: 1.15 to 1.38 times the
        # bytes), unless nobody outside can be asked.
        swarm.only([split_peer(partner)[0] for partner in role.partners])
        patience_s = PARTNER_PATIENCE_S
        if self._timeout_s is not None:
            patience_s = min(patience_s, self._timeout_s / 2)
        try:
            return swarm.fetch(
                self._priorities(wanted), phase=phase, doing=doing, patience_s=patience_s
            )
        except StalledError:
            logger.warning(
                "%s: other nodes bring nothing for %.0f s; taking the rest from outside",
                doing,
                patience_s,
            )
            return None
        finally:
            swarm.only(None)

    def recheck(self) -> bool:
        """Hashes all files against the pieces; whether any piece was bad. `complete` mends it."""
        swarm = self._open()
        before = self._have
        # Until the check is over nothing is known, and an end before that must leave no claim.
        self._place.record.write(Record())
        self._is_open = False
        self._count_check()
        self._have = tuple(swarm.recheck().have)
        self._is_open = True
        if self._have == before:
            self._remember(done=self._was_done)
            return False
        num_bad = sum(was and not now for was, now in zip(before, self._have, strict=True))
        logger.warning("%s: %d damaged pieces on the disk", self._torrent.name, num_bad)
        self._was_done = False
        return True

    def close(self) -> None:
        """Keeps resume data and ends the session."""
        swarm, self._swarm = self._swarm, None
        if swarm is None:
            return
        sent_bytes = swarm.sent_bytes
        try:
            if self._is_open:
                self._is_open = False
                self._keep_state(swarm)
        except MagnetarError as error:
            # Often the very disk error that ended the download, which is what the user should see.
            logger.warning("what is on disk will be hashed again next time: %s", error)
        finally:
            swarm.close()
            self._received_bytes = swarm.received_bytes
            self._sent_bytes = sent_bytes

    def _keep_state(self, swarm: Swarm) -> None:
        if self._was_done:
            swarm.remove()
            return
        have = swarm.verified()
        swarm.save_resume_data()
        self._have = have or self._have
        swarm.remove()
        # Only now can no write come any more that would change a fingerprint.
        self._remember(done=False)

    def _open(self) -> Swarm:
        """The torrent in a session, with what is on disk known, and nothing wanted at first."""
        swarm = self._start()
        if self._is_open:
            return swarm
        self._place.data.mkdir(parents=True, exist_ok=True)
        record = self._place.record.read()
        is_fresh = self._matches(record)
        resume = self._place.resume_data() if is_fresh else None
        self._was_done = is_fresh and (record.complete or self.wanted() <= record.pieces)
        if resume is None:
            self._count_check()
        status = swarm.add(self._job(resume=resume))
        self._is_open = True
        self._have = tuple(status.have)
        return swarm

    def _start(self) -> Swarm:
        """The session, started when it is first needed."""
        if self._swarm is not None:
            return self._swarm
        contacts = Contacts(trackers=self._trackers, peers=self._peers, dht=self._dht)
        self._addresses = self._resolved(contacts)
        is_local_only = bool(self._addresses) and all(is_local(host) for host, _ in self._addresses)
        urls = self._trackers + self._web_seeds
        reaches_out = self._dht or not all(map(_is_loopback, urls))
        listen = own_interfaces(self._addresses, reaches_out=reaches_out).split(",")
        if self._lan_address is not None:
            ours = shown((self._lan_address, 0))
            listen = [*(each for each in listen if each != ours), ours]
        session = self._session_factory(
            SessionSettings(
                listen=",".join(listen),
                utp=not is_local_only,
                utp_out=self._lan_address is None,
                # Partners know each other by one address, and let nobody else in for a while.
                leaves_by=(self._lan_address or "") if is_local_only else "",
                # Nobody outside need learn which nodes there are.
                pex=self._lan_address is None,
                dht=self._dht,
            )
        )
        self._swarm = Swarm(
            session=session,
            contacts=contacts,
            named_peers=self._addresses,
            timeout_s=self._timeout_s,
            on_progress=self._on_progress,
            on_resume_data=self._keep_resume_data,
            stop=self._stop,
            node=self._node,
        )
        return self._swarm

    def _resolved(self, contacts: Contacts) -> tuple[Address, ...]:
        addresses: dict[Address, None] = {}
        for peer in self._peers:
            host, port = split_peer(peer)
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError:
                contacts.failed(f"peer {peer}: its name does not resolve")
                logger.warning("peer %s: its name does not resolve", peer)
                continue
            addresses.update({(str(info[4][0]), port): None for info in found})
        return tuple(addresses)

    def _job(self, *, resume: bytes | None = None) -> TorrentJob:
        job = TorrentJob(
            info_hash=self._place.info_hash,
            save_path=self._place.data,
            metainfo=self._metainfo,
            trackers=self._trackers,
            web_seeds=self._web_seeds,
            peers=self._addresses,
        )
        if self._metainfo is None:
            return job
        return replace(
            job,
            piece_priorities=self._priorities(()),
            unwanted=frozenset(self._chosen.surplus),
            resume=resume,
        )

    def _priorities(self, wanted: Iterable[int], *, level: int = 4) -> list[int]:
        priorities = [0] * self._torrent.num_pieces
        for piece in wanted:
            priorities[piece] = level
        return priorities

    def _matches(self, record: Record) -> bool:
        return fingerprints(self._place.data, self._chosen.wanted) == dict(record.files)

    def _remember(self, *, done: bool) -> None:
        """Writes down what is there. `done`: everything wanted is, and nothing is under way."""
        earlier = self._place.record.read()
        now = fingerprints(self._place.data, self._chosen.wanted)
        md5 = {
            path: digest
            for path, digest in earlier.md5.items()
            if path in now and earlier.files.get(path) == now[path]
        }
        there = frozenset(piece for piece, is_there in enumerate(self._have) if is_there)
        complete = done and self._file_pieces(self._chosen.wanted) <= there
        self._place.record.write(Record(complete=complete, files=now, md5=md5, pieces=there))
        self._was_done = done

    def _keep_resume_data(self, data: bytes) -> None:
        self._place.save_resume_data(data)
        self._remember(done=False)

    @property
    def _piece_map(self) -> PieceMap:
        return PieceMap.of_torrent(self._torrent)

    def _file_pieces(self, paths: Iterable[str]) -> frozenset[int]:
        return frozenset(
            piece for path in paths for piece in self._torrent.pieces(self._torrent.file(path))
        )

    def _count_check(self) -> None:
        there = fingerprints(self._place.data, self._chosen.wanted)
        self.hashed_bytes += sum(file.size for file in there.values())


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
