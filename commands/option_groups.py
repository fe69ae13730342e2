"""Options that several verbs share."""

import argparse
from typing import Literal, get_args

from ..cluster.machines import ComputeDtype
from ..cluster.plan import Objective
from ..fetcher.config import ChatFormat
from ..settings import DEFAULT_HOST, DEFAULT_PORT
from .console import PROGRESS_MODES
from .values import (
    checked_by,
    natural,
    node_limit,
    node_pin,
    port,
    positive,
    positive_float,
    rate,
    window,
)

CONCURRENCY_HELP = "requests of full context that fit in memory (8)"
_RAY_HELP = "an existing Ray cluster (one is started here)"
_SOURCE_HELP = "a magnet link, a name of the catalogue, a .torrent file or a release folder"


def add_common(parser: argparse._ActionsContainer, *, progress: str) -> None:
    """Options that stand before or after the verb; after it they have no default of their own."""
    parser.add_argument(
        "--progress",
        choices=PROGRESS_MODES,
        default=progress,
        help="how progress is shown on stderr: a live line per phase on a terminal, else one JSON "
        "object a line (auto)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS if progress == argparse.SUPPRESS else False,
        help="show where an error comes from",
    )


def add_source(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """SOURCE, by position."""
    nargs: Literal["?"] | None = "?" if optional else None
    parser.add_argument("source", nargs=nargs, metavar="SOURCE", help=_SOURCE_HELP)


def add_manifest(parser: argparse.ArgumentParser) -> None:
    """A manifest in place of SOURCE."""
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="a manifest in place of SOURCE; options given here win over it",
    )


def add_store(parser: argparse._ActionsContainer) -> None:
    """Where releases are kept."""
    parser.add_argument("--store", metavar="DIR", help="folder that keeps releases")


def add_network(parser: argparse.ArgumentParser) -> None:
    """How to fetch, and where to keep it."""
    group = parser.add_argument_group("fetching")
    add_store(group)
    group.add_argument(
        "--peer",
        action="append",
        type=checked_by("split_peer"),
        metavar="HOST:PORT",
        help="a peer to ask besides those of the swarm; may be given several times",
    )
    add_urls(group)
    group.add_argument(
        "--timeout",
        type=positive_float,
        metavar="SECONDS",
        help="give up when nothing arrives for this long (wait for ever)",
    )
    group.add_argument(
        "--download-limit",
        type=rate,
        metavar="RATE",
        help="take at most so much a second from outside, on each node, for example 20MB"
        " (no limit)",
    )
    group.add_argument(
        "--upload-limit",
        type=rate,
        metavar="RATE",
        help="give at most so much a second to outside, on each node; 0 is no limit (4MiB)",
    )


def add_urls(parser: argparse._ActionsContainer) -> None:
    """Trackers and web seeds."""
    parser.add_argument(
        "--tracker",
        action="append",
        type=checked_by("check_tracker"),
        metavar="URL",
        help="a tracker, which may be on your own network; may be given several times",
    )
    parser.add_argument(
        "--web-seed",
        action="append",
        type=checked_by("check_web_seed"),
        metavar="URL",
        help="an HTTP server that holds the files too (BEP 19); may be given several times",
    )


def add_facts(parser: argparse.ArgumentParser) -> None:
    """How to fetch, and what a release's own files may lack."""
    add_network(parser)
    group = parser.add_argument_group("facts that a release's own files may lack")
    group.add_argument(
        "--rope-theta", type=positive_float, metavar="X", help="base of the rotary embedding"
    )
    group.add_argument(
        "--sliding-window",
        type=window,
        metavar="TOKENS",
        help="how far attention looks back, or none",
    )
    group.add_argument(
        "--max-context",
        type=positive,
        metavar="TOKENS",
        help="longest text, prompt and answer, to serve",
    )
    group.add_argument(
        "--chat-format", choices=get_args(ChatFormat), help="how messages become tokens"
    )


def add_ray_address(
    parser: argparse._ActionsContainer,
    help: str = _RAY_HELP,
) -> None:
    """A cluster to join, and in `help` what for."""
    parser.add_argument("--ray-address", metavar="ADDRESS", help=help)


def add_placement(parser: argparse.ArgumentParser, ray_help: str = _RAY_HELP) -> None:
    """How a model is laid over machines; `ray_help` says what a cluster is joined for."""
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--stages",
        type=positive,
        metavar="N",
        help="parts to split the layers into (what is best, or fewest where speeds are unknown)",
    )
    group.add_argument(
        "--pipelines",
        type=positive,
        metavar="N",
        help="times to hold the whole model (1, or what is best for throughput)",
    )
    group.add_argument(
        "--dtype",
        choices=get_args(ComputeDtype),
        help="number format of the weights (as stored); int8 and int4 are rounded while loading",
    )
    group.add_argument(
        "--objective",
        choices=get_args(Objective),
        help="what to be best at where `magnetar nodes` has measured: one stream, all streams "
        "together, or few nodes (latency)",
    )
    group.add_argument(
        "--exclude",
        action="append",
        metavar="NODE",
        help="a node that gets nothing; may be given several times, as the next two",
    )
    group.add_argument(
        "--limit",
        action="append",
        type=node_limit,
        metavar="NODE=SIZE",
        help="use at most so much memory of each device of a node, for example a=24GB",
    )
    group.add_argument(
        "--pin",
        action="append",
        type=node_pin,
        metavar="NODE=LAYERS",
        help="these layers for a node and no others, for example a=0-7",
    )
    add_ray_address(group, ray_help)


def add_serving(parser: argparse.ArgumentParser) -> None:
    """How it is served."""
    group = parser.add_argument_group("serving")
    group.add_argument("--name", metavar="NAME", help="name of the deployment and of the model")
    group.add_argument("--host", metavar="HOST", help=f"address to listen on ({DEFAULT_HOST})")
    group.add_argument(
        "--port", type=port, metavar="PORT", help=f"0 takes a free one ({DEFAULT_PORT})"
    )
    group.add_argument("--max-concurrency", type=positive, metavar="N", help=CONCURRENCY_HELP)
    group.add_argument(
        "--max-running",
        type=positive,
        metavar="N",
        help="requests worked on at a time, most of them shorter (64, or --max-concurrency)",
    )
    group.add_argument(
        "--max-waiting",
        type=natural,
        metavar="N",
        help="requests that wait beside them; more are answered 429 (256)",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        default=None,
        help="reproducible mode: a request gets the same, to the last bit, whatever else is served",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the key that clients must send; needed beyond loopback",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """The form of what is printed."""
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="form of what is printed"
    )
