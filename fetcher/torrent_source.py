"""A magnet link or a .torrent file, and the release that it names in a store."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InterruptedByUserError, NotFoundError, ReleaseError, VerifyError
from .layout import Selection, select_files
from .store import ReleaseFolder, Store
from .torrent.bencode import decode, encode
from .torrent.connection import Connection, Sources
from .torrent.inside import is_inside
from .torrent.lending import Lender
from .torrent.magnet import (
    Magnet,
    check_tracker,
    check_web_seed,
    parse_magnet,
    split_peer,
)
from .torrent.metainfo import MAX_METAINFO_BYTES, Metainfo, parse_metainfo
from .torrent.session import TorrentJob

logger = logging.getLogger(__name__)

_WAIT_S = 0.5
"""Between two looks at who has the release."""


class TorrentSource:
    """Finds the metainfo of one torrent. Blocking; one thread; `close` in the end."""

    def __init__(
        self,
        location: str,
        *,
        is_magnet: bool,
        store: Store,
        peers: tuple[str, ...],
        trackers: tuple[str, ...],
        web_seeds: tuple[str, ...],
        dht: bool | None,
        lan_address: str | None,
        connect: Callable[[Sources], Connection],
        who: str = "",
    ) -> None:
        """`dht` None asks the DHT only when no peer is named. The user names `trackers` and
        `web_seeds`, which may be on the own network; those of a link or .torrent may not. `who`
        is as of `Fetch`.

        Raises:
            MagnetError: the magnet link is beyond repair. UsageError: a peer is no HOST:PORT, or
            a tracker or web seed no URL that can be asked.
        """
        self._location = location
        self._store = store
        self._magnet: Magnet | None = None
        self._peers = tuple(dict.fromkeys(peers))
        if is_magnet:
            self._magnet = parse_magnet(location)
            for repair in self._magnet.repairs:
                logger.warning("magnet link: %s", repair)
            self._peers = tuple(dict.fromkeys(peers + self._magnet.peers))
        for peer in self._peers:
            split_peer(peer)
        for url in trackers:
            check_tracker(url)
        for url in web_seeds:
            check_web_seed(url)
        self._trackers, self._web_seeds = trackers, web_seeds
        self._dht = not self._peers if dht is None else dht
        self._lan_address = lan_address
        self._connect = connect
        self._who = who
        self._adopted: Metainfo | None = None
        self._file: Metainfo | None = None
        self._lenders: tuple[Lender, ...] = ()
        self._place: ReleaseFolder | None = None
        self._connection: Connection | None = None

    @property
    def info_hash(self) -> str | None:
        """The torrent's: from the start for a magnet, after `find` for a .torrent file."""
        if self._magnet is not None:
            return self._magnet.info_hash
        return self._file.info_hash if self._file is not None else None

    def identify(self) -> str:
        """The info-hash, for which a .torrent file is read.

        Raises:
            NotFoundError: there is no such file. ReleaseError: it is none.
        """
        if self._magnet is not None:
            return self._magnet.info_hash
        self._file = self._file or _read_torrent_file(Path(self._location))
        return self._file.info_hash

    def borrow(self, lenders: Iterable[Lender], *, lan_address: str) -> None:
        """Asks these nodes first, reached from our address `lan_address`; before `find`."""
        self._lenders, self._lan_address = tuple(lenders), lan_address

    def adopt(self, torrent: bytes) -> None:
        """Takes the .torrent that another node found for the same link, in place of a search.

        Raises:
            ReleaseError: it is none, or not that of the link.
        """
        metainfo = parse_metainfo(torrent)
        if self._magnet is not None and self._magnet.info_hash not in metainfo.info_hashes:
            raise ReleaseError(
                f"another node found metadata with hash {metainfo.info_hash}, not "
                f"{self._magnet.info_hash}: do all nodes fetch the same release?"
            )
        self._adopted = metainfo

    def find(
        self,
    ) -> tuple[ReleaseFolder, Metainfo, Selection, Connection, tuple[Lender, ...]]:
        """The locked place of the release, what is in it and wanted of it, a session, and lenders.

        From the .torrent file, the store or the swarm; kept in the store from then on.

        Raises:
            What `Fetch.metadata` raises.
        """
        if self._magnet is None:
            metainfo = self._file = self._file or _read_torrent_file(Path(self._location))
            place = self._take_place(metainfo.info_hash)
            connection = self._connected(metainfo, is_private=metainfo.is_private)
        else:
            place = self._take_place(self._magnet.info_hash)
            for lender in self._lenders[:1]:
                self.adopt(lender.torrent)
            known = place.metainfo() or self._adopted
            connection = self._connected(
                self._magnet, is_private=known is not None and known.is_private
            )
            metainfo = known or _ask_swarm(self._magnet, place, connection)
        return place, metainfo, _accepted(place, metainfo), connection, self._lenders

    def await_place(
        self, *, stop: threading.Event, timeout_s: float | None, tell: Callable[[str], None]
    ) -> None:
        """Locks the place of the release as soon as nobody else works on it. Before `find`.

        `tell` hears again and again who that is.

        Raises:
            PreflightError: somebody still does after `timeout_s`. InterruptedByUserError.
        """
        place = self._place = self._place or self._store.release_folder(self.identify())
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while (holder := place.try_lock(self._who)) is not None:
            if time.monotonic() > until_s:
                place.lock(self._who)
            tell(holder)
            if stop.wait(_WAIT_S):
                raise InterruptedByUserError("stopped while another process had the release")

    def close(self) -> None:
        """Ends the session and unlocks the store. May be called twice."""
        try:
            if self._connection is not None:
                self._connection.close()
        finally:
            if self._place is not None:
                self._place.unlock()

    def _take_place(self, info_hash: str) -> ReleaseFolder:
        place = self._place = self._place or self._store.release_folder(info_hash)
        place.lock(self._who)
        return place

    def _connected(self, link: Magnet | Metainfo, *, is_private: bool) -> Connection:
        if self._connection is None:
            trackers = _from_outside(link.trackers, "tracker", self._trackers)
            web_seeds = _from_outside(link.web_seeds, "web seed", self._web_seeds)
            self._connection = self._connect(
                Sources(
                    trackers=tuple(dict.fromkeys(self._trackers + trackers)),
                    web_seeds=tuple(dict.fromkeys(self._web_seeds + web_seeds)),
                    peers=self._peers,
                    dht=self._dht and not is_private,
                    lan_address=self._lan_address,
                )
            )
        return self._connection


def _from_outside(urls: tuple[str, ...], what: str, named: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a link that lead outside; the user alone may send us into the own network."""
    inside = [url for url in urls if url not in named and is_inside(url)]
    for url in inside:
        option = f"--{what.replace(' ', '-')}"
        logger.warning(
            "not asking the %s %s of the link, which is on this network: give %s %s if you know it",
            what,
            url,
            option,
            url,
        )
    return tuple(url for url in urls if url not in inside)


def _ask_swarm(magnet: Magnet, place: ReleaseFolder, connection: Connection) -> Metainfo:
    swarm = connection.swarm()
    job = TorrentJob(
        info_hash=magnet.info_hash,
        info_hash_v2=magnet.info_hash_v2,
        save_path=place.data,
        trackers=connection.sources.trackers,
        web_seeds=connection.sources.web_seeds,
        peers=connection.addresses,
    )
    metainfo = parse_metainfo(encode({b"info": decode(swarm.fetch_metadata(job))}))
    if missing := sorted(set(magnet.info_hashes) - set(metainfo.info_hashes)):
        raise VerifyError(
            f"the metadata has hash {metainfo.info_hash}, not {missing[0]}: "
            "try again with other peers"
        )
    return metainfo


def _accepted(place: ReleaseFolder, metainfo: Metainfo) -> Selection:
    """Takes the metainfo when it is a release that can be loaded, and keeps it."""
    selection = select_files({file.path: file.length for file in metainfo.files})
    place.refuse_escape(selection.wanted)
    if place.metainfo() is None:
        place.save_metainfo(metainfo)
    if surplus := selection.surplus:
        logger.warning(
            "%s: not downloading %d files that are not part of the release: %s%s",
            metainfo.name,
            len(surplus),
            ", ".join(surplus[:5]),
            ", ..." if len(surplus) > 5 else "",
        )
    return selection


def _read_torrent_file(path: Path) -> Metainfo:
    try:
        with path.open("rb") as file:
            return parse_metainfo(file.read(MAX_METAINFO_BYTES + 1))
    except OSError as error:
        raise NotFoundError(
            f"{path} cannot be read ({error.strerror}): check the path of the .torrent file"
        ) from error
