"""`TorrentSession` by libtorrent 2.1.

libtorrent's alerts are valid until the next pop only, so they become events here, at once; a kept
alert is a segmentation fault (libtorrent #6437). Requests that the library answers by an alert are
preferred to getters, which block on its network thread.
"""

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ...errors import DownloadError
from .add_params import add_params
from .addresses import Address
from .events import (
    BadPiece,
    Checked,
    Event,
    Flushed,
    ListenFailed,
    Listening,
    MetadataArrived,
    PeerBanned,
    PeerConnected,
    PeerLost,
    PeersFound,
    Removed,
    ResumeData,
    StorageFailed,
    TrackerFailed,
    WebSeedFailed,
)
from .session import PeerView, SessionSettings, TorrentJob, TorrentStatus
from .session_pack import MAX_REQUESTS, packed

STATUS_INTERVAL_S = 0.2
_WRITING = 2
"""`block_info::writing`; from this state on the bytes of a block are here."""


class LibtorrentSession:
    """A `TorrentSession` that announces itself to nobody unasked."""

    def __init__(self, settings: SessionSettings) -> None:
        import libtorrent

        self._lt: Any = libtorrent
        params = self._lt.session_params()
        params.settings = {**params.settings, **packed(settings, self._lt)}
        # mmap writes were the default of 2.0 and grew memory without bound (libtorrent #6667).
        params.disk_io_constructor = "pread_disk_io_constructor"
        self._session: Any = self._lt.session(params)
        self._dht = settings.dht
        self._pex = settings.pex
        self._handle: Any = None
        self._job: TorrentJob | None = None
        self._reaches_out = True
        self._allowed: tuple[str, ...] | None = None
        self._barred: frozenset[str] = frozenset()
        self._wanted: tuple[int, ...] = ()
        self._set_aside: set[int] = set()
        self._status: TorrentStatus | None = None
        self._asked_s = 0.0
        self._earlier = (0, 0)
        """Bytes received and sent before a recheck."""
        self._readers: Mapping[type, Callable[[Any], Event | None]] = self._alert_readers()

    def add(self, job: TorrentJob) -> None:
        self._earlier = (0, 0)
        self._begin(job)

    def _begin(self, job: TorrentJob) -> None:
        try:
            handle = self._session.add_torrent(
                add_params(
                    job,
                    self._lt,
                    reaches_out=self._reaches_out,
                    has_dht=self._dht,
                    has_pex=self._pex,
                )
            )
        except RuntimeError as error:
            raise DownloadError(f"libtorrent refuses {job.info_hash}: {error}") from error
        if job.upload_bytes_per_s:
            handle.set_upload_limit(job.upload_bytes_per_s)
        self._handle = handle
        self._job = job
        self._wanted = tuple(job.piece_priorities)
        self._set_aside.clear()
        self._status = None
        self._asked_s = 0.0

    def poll(self, timeout_s: float) -> list[Event]:
        now_s = time.monotonic()
        if self._handle is not None and now_s - self._asked_s >= STATUS_INTERVAL_S:
            self._asked_s = now_s
            self._handle.post_status(self._lt.status_flags_t.query_pieces)
        self._session.wait_for_alert(max(1, int(timeout_s * 1000)))
        events: list[Event] = []
        for alert in self._session.pop_alerts():
            reader = self._readers.get(type(alert))
            event = reader(alert) if reader is not None else None
            if event is not None:
                events.append(event)
        return events

    def status(self) -> TorrentStatus | None:
        return self._status

    def peers(self) -> list[PeerView]:
        flags, handle = self._lt.peer_info, self._handle
        if handle is None:
            return []
        try:
            found = handle.get_peer_info()
        except RuntimeError:
            return []  # It was removed just now.
        return [
            PeerView(
                has_needed=bool(peer.flags & flags.interesting),
                is_suspected=bool(peer.flags & flags.on_parole),
                chokes_us=bool(peer.flags & flags.remote_choked),
                address=(str(peer.ip[0]), int(peer.ip[1])),
                client=_text(peer.client),
                received_bytes=peer.total_download,
                sent_bytes=peer.total_upload,
                received_bytes_per_s=peer.payload_down_speed,
                sent_bytes_per_s=peer.payload_up_speed,
                num_pieces=peer.num_pieces,
                num_bad_pieces=peer.num_hashfails,
            )
            for peer in found
            if not peer.flags & (flags.connecting | flags.handshake)
        ]

    def begun(self) -> frozenset[int]:
        # The alert with the same has no Python form in 2.1.1.
        handle = self._handle
        if handle is None:
            return frozenset()
        try:
            queue = handle.get_download_queue()
        except RuntimeError:
            return frozenset()  # It was removed just now.
        return frozenset(
            piece["piece_index"]
            for piece in queue
            if any(block["state"] >= _WRITING for block in piece["blocks"])
        )

    def connect(self, peers: Iterable[Address]) -> None:
        if self._handle is None:
            return
        for peer in peers:
            self._handle.connect_peer(peer)

    def only(self, hosts: Iterable[str] | None) -> None:
        self._allowed = None if hosts is None else tuple(hosts)
        self._filter()

    def bar(self, hosts: Iterable[str]) -> None:
        self._barred = frozenset(hosts)
        self._filter()
        if self._handle is None or not self._barred:
            return
        self._set_aside.update(
            piece["piece_index"]
            for piece in self._handle.get_download_queue()
            if any(block["peer"][0] in self._barred for block in piece["blocks"])
        )
        self._prioritize()

    def _filter(self) -> None:
        # A filter that blocks a connected peer disconnects it, so that this takes effect at once.
        lists = self._lt.ip_filter()
        if self._allowed is not None:
            lists.add_rule("0.0.0.0", "255.255.255.255", 1)
            lists.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1)
            for host in self._allowed:
                lists.add_rule(host, host, 0)
        for host in self._barred:
            lists.add_rule(host, host, 1)
        self._session.set_ip_filter(lists)

    def ask_at_most(self, num_blocks: int | None) -> None:
        most = MAX_REQUESTS if num_blocks is None else min(num_blocks, MAX_REQUESTS)
        self._session.apply_settings({"max_out_request_queue": most})

    def reach_out(self, wanted: bool) -> None:
        if wanted == self._reaches_out:
            return
        self._reaches_out = wanted
        if self._handle is None or self._job is None:
            return
        # Its trackers hear that we have stopped.
        self._handle.replace_trackers(
            [{"url": url, "tier": tier} for tier, url in enumerate(self._job.trackers) if wanted]
        )
        for url in self._job.web_seeds:
            if wanted:
                self._handle.add_url_seed(url)
            else:
                self._handle.remove_url_seed(url)
        no_dht = self._lt.torrent_flags.disable_dht
        metainfo = self._job.metainfo
        is_private = metainfo is not None and metainfo.is_private
        if wanted and self._dht and not is_private:
            self._handle.unset_flags(no_dht)
        else:
            self._handle.set_flags(no_dht)

    def prioritize(self, priorities: Sequence[int]) -> None:
        self._wanted = tuple(priorities)
        self._prioritize()

    def _prioritize(self) -> None:
        priorities = list(self._wanted)
        for piece in self._set_aside:
            priorities[piece] = 0
        self._handle.prioritize_pieces(priorities)

    def urge(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            self._handle.set_piece_deadline(piece, 0)

    def flush(self) -> None:
        self._handle.flush_cache()

    def request_resume_data(self) -> None:
        flags = self._lt.save_resume_flags_t
        self._handle.save_resume_data(flags.flush_disk_cache)

    def hold(self) -> None:
        self._handle.set_flags(self._lt.torrent_flags.upload_mode)

    def go_on(self) -> None:
        self._handle.clear_error()
        flags = self._lt.torrent_flags
        self._handle.unset_flags(flags.upload_mode | flags.paused)

    def recheck(self) -> None:
        # A new torrent, and not force_recheck: blocks that a full disk did not take are read back
        # as others, and then whoever had sent them is banned for good as if he had lied.
        self._begin_again(None)

    def begin_afresh(self) -> None:
        have = self._handle.status(self._lt.status_flags_t.query_pieces).pieces
        self._begin_again([piece for piece, is_there in enumerate(have) if is_there])

    def _begin_again(self, known: Sequence[int] | None) -> None:
        old, job, status = self._handle, self._job, self._status or TorrentStatus()
        assert job is not None
        job = replace(job, known=known, found={}, begun=(), piece_priorities=self._wanted)
        # libtorrent counts from zero after it.
        self._earlier = (status.downloaded_bytes, status.uploaded_bytes)
        self._session.remove_torrent(old)
        self._begin(job)

    def remove(self) -> None:
        handle, self._handle = self._handle, None
        self._status = None
        self._session.remove_torrent(handle)

    def close(self) -> None:
        self._handle = None
        self._session = None

    def _alert_readers(self) -> Mapping[type, Callable[[Any], Event | None]]:
        lt = self._lt
        return {
            lt.state_update_alert: self._read_status,
            lt.metadata_received_alert: lambda alert: MetadataArrived(
                bytes(alert.handle.torrent_file().info_section())
            ),
            lt.peer_connect_alert: lambda alert: PeerConnected(alert.endpoint),
            lt.peer_disconnected_alert: _read_lost,
            lt.peer_error_alert: _read_lost,
            lt.tracker_reply_alert: lambda alert: PeersFound(alert.url, alert.num_peers),
            lt.dht_reply_alert: lambda alert: PeersFound("DHT", alert.num_peers),
            lt.tracker_error_alert: lambda alert: TrackerFailed(
                alert.url, alert.failure_reason() or alert.error.message()
            ),
            lt.url_seed_alert: lambda alert: WebSeedFailed(
                alert.server_url(), alert.error_message() or alert.error.message()
            ),
            lt.file_error_alert: lambda alert: StorageFailed(
                alert.filename(), alert.error.message(), _is_full(alert.error)
            ),
            lt.torrent_error_alert: lambda alert: StorageFailed(
                "", alert.error.message(), _is_full(alert.error)
            ),
            lt.listen_succeeded_alert: lambda alert: (
                # One alert for each protocol on the port; peers connect to TCP.
                Listening((str(alert.address), int(alert.port)))
                if int(alert.socket_type) == int(lt.socket_type_t.tcp)
                else None
            ),
            lt.listen_failed_alert: lambda alert: ListenFailed(alert.message()),
            lt.save_resume_data_alert: lambda alert: ResumeData(
                bytes(lt.write_resume_data_buf(alert.params))
            ),
            lt.save_resume_data_failed_alert: lambda alert: ResumeData(b""),
            lt.hash_failed_alert: lambda alert: BadPiece(alert.piece_index),
            lt.peer_ban_alert: lambda alert: PeerBanned(alert.endpoint),
            lt.cache_flushed_alert: lambda alert: Flushed(),
            lt.torrent_checked_alert: self._read_checked,
            lt.torrent_finished_alert: self._read_finished,
            lt.torrent_removed_alert: lambda alert: Removed(),
        }

    def _read_checked(self, alert: Any) -> Event:
        # A reading that was under way before the check ended must not pass for its outcome.
        self._status = None
        self._asked_s = 0.0
        return Checked()

    def _read_finished(self, alert: Any) -> None:
        # Whoever waits for the last piece should not wait for the next reading too.
        self._asked_s = 0.0

    def _read_status(self, alert: Any) -> None:
        states = self._lt.torrent_status.states
        for status in alert.status:
            if self._handle is None or status.handle != self._handle:
                continue
            if status.state in (states.checking_files, states.checking_resume_data):
                state: Literal["metadata", "checking", "active"] = "checking"
            elif status.has_metadata:
                state = "active"
            else:
                state = "metadata"
            self._status = TorrentStatus(
                state=state,
                is_paused=bool(status.flags & self._lt.torrent_flags.paused),
                num_peers=status.num_peers,
                num_seeds=status.num_seeds,
                have=tuple(status.pieces),
                checked=status.progress if state == "checking" else 0.0,
                wanted_bytes=status.total_wanted,
                wanted_done_bytes=status.total_wanted_done,
                downloaded_bytes=self._earlier[0] + status.total_payload_download,
                uploaded_bytes=self._earlier[1] + status.total_payload_upload,
                wasted_bytes=status.total_redundant_bytes + status.total_failed_bytes,
                rate_bytes_per_s=status.download_payload_rate,
            )


def _read_lost(alert: Any) -> Event:
    reason = alert.error.message()
    # Whose blocks turn out to have been the wrong ones is shut out without an alert of its own.
    return (
        PeerBanned(alert.endpoint) if reason == "peer banned" else PeerLost(alert.endpoint, reason)
    )


def _text(client: bytes | str) -> str:
    """What a peer calls itself, in printable characters alone."""
    text = client if isinstance(client, str) else client.decode(errors="replace")
    return "".join(letter for letter in text[:60] if letter.isprintable())


def _is_full(error: Any) -> bool:
    return error.value() in (errno.ENOSPC, errno.EDQUOT) and error.category().name() == "system"
