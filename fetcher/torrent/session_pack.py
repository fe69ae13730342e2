"""The settings of a session in libtorrent's names."""

import os
from typing import Any, Final

from .session import SessionSettings

MAX_REQUESTS: Final = 500
"""Blocks asked of one peer at a time. Long queues blur the order of pieces: 3000 requests of 16 KiB
are 48 MB a peer."""


def packed(settings: SessionSettings, lt: Any) -> dict[str, object]:
    """What libtorrent is told; `lt` is its module."""
    category = lt.alert.category_t
    small = {
        "alert_queue_size": 1000,
        "aio_threads": 1,
        "hashing_threads": 1,
        "max_queued_disk_bytes": 1 << 20,
        "file_pool_size": 10,
        "tick_interval": 500,
    }
    return {
        "alert_mask": category.error_notification
        | category.status_notification
        | category.storage_notification
        | category.tracker_notification
        | category.connect_notification
        | category.peer_notification
        | category.dht_notification,
        "alert_queue_size": 100_000,
        "listen_interfaces": settings.listen,
        "outgoing_interfaces": settings.leaves_by,
        # A port that is taken is an error, not a reason to listen on another one.
        "max_retry_port_bind": 0,
        "listen_system_port_fallback": False,
        "enable_dht": settings.dht,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": settings.utp,
        "enable_outgoing_utp": settings.utp,
        "upload_rate_limit": settings.upload_bytes_per_s,
        "download_rate_limit": settings.download_bytes_per_s,
        "unchoke_slots_limit": -1,
        # Several nodes may share one address, and nodes that have finished stay in touch.
        "allow_multiple_connections_per_ip": True,
        "close_redundant_connections": False,
        "auto_sequential": False,
        "max_out_request_queue": MAX_REQUESTS,
        "request_queue_time": 1,
        # Else a fast peer is asked for what lies beside a wanted piece, whatever its priority: half
        # of the last layers came before the first were whole. And the first pieces are any ones.
        "whole_pieces_threshold": 0,
        "initial_picker_threshold": 0,
        "send_buffer_watermark": 4 << 20,
        "send_buffer_low_watermark": 1 << 20,
        # Bytes are hashed and written while they are still in a processor's cache, and memory is
        # used again: with 128 MiB a download into /dev/shm took a quarter longer. What a disk is
        # too slow for, the system's cache of pages takes up.
        "max_queued_disk_bytes": 16 << 20,
        "file_pool_size": 100,
        "hashing_threads": len(os.sched_getaffinity(0)),
        # A named peer that is not up yet is asked again soon.
        "min_reconnect_time": 1 if settings.seeks else 60,
        "max_failcount": 1000 if settings.seeks else 3,
        # Peers are connected at the next tick: half a second at libtorrent's default.
        "tick_interval": 100,
        "stop_tracker_timeout": 1,
        "user_agent": f"Magnetar libtorrent/{lt.__version__}",
    } | (small if settings.is_small else {})
