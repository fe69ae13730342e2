"""A `TorrentJob` in libtorrent's form."""

from typing import Any

from ...errors import ReleaseError
from .magnet import exact_topic
from .metainfo import Metainfo
from .session import TorrentJob


def add_params(job: TorrentJob, lt: Any, *, reaches_out: bool, has_dht: bool, has_pex: bool) -> Any:
    """libtorrent's parameters; `lt` is its module.

    Raises:
        ReleaseError: the library sees other files in the torrent than we do.
    """
    if job.metainfo is None:
        hashes = filter(None, (job.info_hash, job.info_hash_v2))
        topics = "&".join(f"xt={exact_topic(info_hash)}" for info_hash in hashes)
        params = lt.parse_magnet_uri(f"magnet:?{topics}")
    else:
        loaded = lt.load_torrent_buffer(job.metainfo.raw)
        _refuse_disagreement(loaded.ti, job.metainfo)
        params = _resumed(job, loaded, lt)
    # Not paused and not queued by libtorrent; what a resume file says about peers is dropped.
    flags = lt.torrent_flags.disable_lsd | lt.torrent_flags.apply_ip_filter
    if job.metainfo is None:
        flags |= lt.torrent_flags.default_dont_download
    if job.is_seed:
        flags |= lt.torrent_flags.seed_mode
    is_private = job.metainfo is not None and job.metainfo.is_private
    if not (has_dht and reaches_out) or is_private:
        flags |= lt.torrent_flags.disable_dht
    if not has_pex or is_private:
        flags |= lt.torrent_flags.disable_pex
    params.flags = flags
    params.save_path = str(job.save_path)
    trackers, web_seeds = (job.trackers, job.web_seeds) if reaches_out else ((), ())
    params.trackers = list(trackers)
    params.tracker_tiers = list(range(len(trackers)))
    params.url_seeds = list(web_seeds)
    params.peers = list(job.peers)
    params.piece_priorities = list(job.piece_priorities)
    if job.metainfo is not None:
        layout = params.ti.layout()
        params.file_priorities = [
            0 if layout.file_path(i) in job.unwanted else 4 for i in range(layout.num_files())
        ]
    return params


def _resumed(job: TorrentJob, loaded: Any, lt: Any) -> Any:
    """Of resume data only hashes of version 2 count, which are proved, and begun pieces."""
    read = None if job.resume is None else read_resume(job.resume, lt)
    if read is None or read.info_hashes != loaded.ti.info_hashes():
        params = loaded
    else:
        params = read
        params.ti = loaded.ti
        params.renamed_files = {}
    begun = {
        piece: blocks
        for piece, blocks in params.unfinished_pieces.items()
        if piece in job.begun and piece not in (job.known or ())
    }
    params.verified_pieces = []
    params.have_pieces = []
    params.unfinished_pieces = begun | {piece: list(blocks) for piece, blocks in job.found.items()}
    if job.known is not None:
        known = frozenset(job.known)
        params.have_pieces = [piece in known for piece in range(loaded.ti.num_pieces())]
    return params


def read_resume(data: bytes, lt: Any) -> Any:
    """None for damaged data."""
    try:
        return lt.read_resume_data(data)
    except RuntimeError:
        return None


def _refuse_disagreement(info: Any, metainfo: Metainfo) -> None:
    """Our reading of the torrent and the library's must name the same files and pieces."""
    layout = info.layout()
    theirs = {
        layout.file_path(i)
        for i in range(layout.num_files())
        if not layout.file_flags(i) & layout.flag_pad_file
    }
    if theirs != {file.path for file in metainfo.files} or info.num_pieces() != metainfo.num_pieces:
        raise ReleaseError(
            f"unsafe torrent {metainfo.name}: libtorrent would save other file names than it lists"
        )
