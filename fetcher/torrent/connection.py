"""The session of one fetch: whom it may ask, and what went over the network in all."""

import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from ..progress import ProgressSink
from ..rates import RateLimits
from .addresses import Address, is_local, own_interfaces, routes
from .contacts import Contacts, shown
from .magnet import split_peer
from .session import WAN_UPLOAD_BYTES_PER_S, SessionSettings, TorrentSession
from .swarm import Swarm
from .traffic import Traffic

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Whom to ask for a torrent, and where others reach us."""

    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    """``HOST:PORT``."""
    dht: bool = False
    lan_address: str | None = None
    """This node's own, on which it then listens for partners."""


class Connection:
    """A `Swarm`, started when it is first needed. One thread; `close` in the end."""

    def __init__(
        self,
        sources: Sources,
        *,
        session_factory: Callable[[SessionSettings], TorrentSession],
        timeout_s: float | None,
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str,
        limits: RateLimits,
    ) -> None:
        self.sources = sources
        self._limits = limits
        self.timeout_s = timeout_s
        self.on_resume_data: Callable[[bytes], None] = _ignore
        """What is done with resume data; there is none before a torrent with files is added."""
        self.on_readable: Callable[[Sequence[bool]], None] = _ignore
        """Who hears which pieces may be read from the files."""
        self._session_factory = session_factory
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._swarm: Swarm | None = None
        self._addresses: tuple[Address, ...] = ()
        self._traffic = Traffic()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The named peers whose names resolve; after `swarm`."""
        return self._addresses

    @property
    def is_started(self) -> bool:
        """Whether there is a session now."""
        return self._swarm is not None

    @property
    def received_bytes(self) -> int:
        """Payload that came over the network."""
        return self.traffic.received_bytes

    @property
    def sent_bytes(self) -> int:
        """Payload that went to others, at the last reading."""
        return self.traffic.sent_bytes

    @property
    def traffic(self) -> Traffic:
        """By peer and in all, at the last reading; for any thread."""
        swarm = self._swarm
        return swarm.meter.traffic() if swarm is not None else self._traffic

    def has_way_out(self) -> bool:
        """Whether there is a route to anybody of these sources; after `swarm`."""
        sources = self.sources
        urls = sources.trackers + sources.web_seeds
        if any(map(_is_loopback, urls)):
            return True
        return bool(routes(self._addresses, reaches_out=sources.dht or bool(urls)))

    def swarm(self) -> Swarm:
        """The session, which listens from now on only where these sources reach it."""
        if self._swarm is not None:
            return self._swarm
        sources = self.sources
        contacts = Contacts(trackers=sources.trackers, peers=sources.peers, dht=sources.dht)
        self._addresses = _resolved(sources.peers, contacts)
        self._swarm = Swarm(
            session=self._session_factory(_settings(sources, self._addresses, self._limits)),
            contacts=contacts,
            named_peers=self._addresses,
            timeout_s=self.timeout_s,
            on_progress=self._on_progress,
            on_resume_data=lambda data: self.on_resume_data(data),
            on_readable=lambda have: self.on_readable(have),
            stop=self._stop,
            node=self._node,
        )
        return self._swarm

    def close(self) -> None:
        """Ends the session, if there is one."""
        swarm, self._swarm = self._swarm, None
        if swarm is not None:
            self._traffic = replace(swarm.meter.traffic(), peers=())
            swarm.close()


def _settings(
    sources: Sources, addresses: tuple[Address, ...], limits: RateLimits
) -> SessionSettings:
    is_local_only = bool(addresses) and all(is_local(host) for host, _ in addresses)
    urls = sources.trackers + sources.web_seeds
    reaches_out = sources.dht or not all(map(_is_loopback, urls))
    is_nobody_outside = not addresses and not urls and not sources.dht
    # A tracker on this network may lie behind another interface than the world.
    asked = (*addresses, *_numeric_hosts(urls))
    listen = own_interfaces(asked, reaches_out=reaches_out).split(",")
    lan_address = sources.lan_address
    if lan_address is not None:
        ours = shown((lan_address, 0))
        listen = [*(each for each in listen if each != ours), ours]
    upload = limits.upload_bytes_per_s
    return SessionSettings(
        listen=",".join(listen),
        # Whoever tries uTP while it is shut out goes on for long, and takes us for connected.
        utp=not is_local_only and lan_address is None,
        # Partners know each other by one address, and let nobody else in for a while.
        leaves_by=(lan_address or "") if is_local_only or is_nobody_outside else "",
        # Nobody outside need learn which nodes there are.
        pex=lan_address is None,
        dht=sources.dht,
        download_bytes_per_s=limits.download_bytes_per_s,
        upload_bytes_per_s=WAN_UPLOAD_BYTES_PER_S if upload is None else upload,
    )


def _resolved(peers: tuple[str, ...], contacts: Contacts) -> tuple[Address, ...]:
    addresses: dict[Address, None] = {}
    for peer in peers:
        host, port = split_peer(peer)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            contacts.failed(f"peer {peer}: its name does not resolve")
            logger.warning("peer %s: its name does not resolve", peer)
            continue
        addresses.update({(str(info[4][0]), port): None for info in found})
    return tuple(addresses)


def _numeric_hosts(urls: tuple[str, ...]) -> Iterator[Address]:
    """The hosts of URLs that are IP addresses; names are not looked up."""
    for url in urls:
        host = urlsplit(url).hostname or ""
        with contextlib.suppress(ValueError):
            yield str(ipaddress.ip_address(host)), 9


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _ignore(news: bytes | Sequence[bool]) -> None: ...
