"""The verb ``seed``: a release folder is shared as a torrent."""

import argparse
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..errors import NotFoundError, UsageError
from ..fetcher.progress import Progress
from ..fetcher.torrent.formats import TorrentFormat
from .console import Console, json_text
from .option_groups import add_output, add_store, add_urls
from .values import duration, positive_float, rate
from .verb import Verbs
from .wishes import store_of

if TYPE_CHECKING:
    from ..fetcher.torrent.seed import SeedInfo


def add_seed(verbs: Verbs) -> None:
    """`magnetar seed` and its options."""
    parser = verbs.add("seed", seed, "share a release folder; prints its magnet link")
    parser.add_argument("folder", metavar="DIR", help="folder of a complete release")
    parser.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="address to listen on"
    )
    parser.add_argument(
        "--format",
        choices=get_args(TorrentFormat),
        default="v1",
        help="of the torrent: v1 is read by every client, v2 has a hash tree for each file, hybrid "
        "is both (v1)",
    )
    add_urls(parser)
    parser.add_argument(
        "--private",
        action="store_true",
        help="peers find each other by the trackers alone: no DHT, no peer exchange",
    )
    parser.add_argument("--torrent", metavar="FILE", help="write the .torrent file here as well")
    parser.add_argument(
        "--upload-limit",
        type=rate,
        default=0,
        metavar="RATE",
        help="send at most so much a second, for example 500kB or 5MB (no limit)",
    )
    parser.add_argument(
        "--ratio",
        type=positive_float,
        metavar="X",
        help="stop when so many times the files' bytes were sent",
    )
    parser.add_argument(
        "--stop-after",
        type=duration,
        metavar="TIME",
        help="stop after this time, for example 90s, 30m, 12h or 7d",
    )
    parser.add_argument(
        "--stop-on-eof", action="store_true", help="stop when standard input is closed"
    )
    add_store(parser)
    add_output(parser)


def seed(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Shares a release folder until it is told to stop."""
    folder = Path(args.folder).expanduser()
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {args.folder!r}: check the path")
    from ..fetcher.record import replace_file
    from ..fetcher.torrent.seed import SeedLimits, TorrentKind
    from ..fetcher.torrent.seed import seed as share

    if args.private and args.torrent is None:
        raise UsageError(
            "nobody can begin with the link of a private torrent, for peers do not send what is in "
            "it: give --torrent FILE, and hand that file out"
        )
    kind = TorrentKind(
        format=args.format,
        trackers=tuple(args.tracker or ()),
        web_seeds=tuple(args.web_seed or ()),
        private=args.private,
    )

    hashed: list[Progress] = []

    def telling(progress: Progress) -> None:
        if progress.phase == "verify":
            hashed[:] = [progress]
        console.progress(progress)

    def ready(info: "SeedInfo") -> None:
        for last in hashed:
            console.progress(replace(last, done_bytes=last.total_bytes, finished=True))
        told = {"magnet": info.magnet, "info_hash": info.info_hash, "address": info.address}
        if args.torrent is not None:
            replace_file(Path(args.torrent).expanduser(), info.torrent)
            told["torrent"] = args.torrent
        useful = args.torrent if args.private else info.magnet
        console.data(json_text(told) if args.output == "json" else useful)
        console.note(f"peers reach this seed at {info.address}")

    if args.stop_on_eof:
        threading.Thread(target=_stop_on_eof, args=(stop,), name="stdin", daemon=True).start()
    ended = share(
        folder,
        kind=kind,
        limits=SeedLimits(
            ratio=args.ratio,
            stop_after_s=args.stop_after,
            upload_bytes_per_s=args.upload_limit,
        ),
        listen=args.listen,
        on_ready=ready,
        stop=stop,
        cache=store_of(args),
        on_progress=telling,
    )
    console.note(f"no longer shared: {ended}")


def _stop_on_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()
