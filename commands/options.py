"""What may be asked on the command line: verbs, options and what their values may be.

Imported for ``magnetar --help``: nothing heavier than the standard library, and this package's
plain data.
"""

import argparse
import re
from collections.abc import Callable
from typing import Literal, NoReturn, get_args

from .. import __version__
from ..cluster.plan import ComputeDtype, Objective
from ..errors import UsageError
from ..fetcher.config import ChatFormat
from ..fetcher.torrent.formats import TorrentFormat
from ..settings import DEFAULT_HOST, DEFAULT_PORT
from .console import PROGRESS_MODES

_EXIT_CODES = """\
exit codes: 0 done, 1 failed, 2 usage or invalid manifest, 4 not found, 6 timed out,
7 it cannot work on this machine, 130 interrupted
"""
_CONCURRENCY_HELP = "requests of full context that fit in memory (8)"
_SOURCE_HELP = "a magnet link, a name of the catalogue, a .torrent file or a release folder"


class _Parser(argparse.ArgumentParser):
    """An argument parser that says which choice was probably meant."""

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            from ..manifests.suggest import did_you_mean

            message += did_you_mean(match[1], re.findall(r"'([^']*)'", match[2]))
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options; options that were not given are None."""
    parser = _Parser(
        prog="magnetar",
        description="From a magnet link to a served Mixture-of-Experts model.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"magnetar {__version__}")
    _add_common(parser, progress="auto")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    common = _Parser(add_help=False)
    _add_common(common.add_argument_group("output"), progress=argparse.SUPPRESS)

    def verb(name: str, help: str, description: str = "") -> argparse.ArgumentParser:
        text = description or help[0].upper() + help[1:] + "."
        return verbs.add_parser(name, help=help, description=text, parents=[common])

    up = verb(
        "up",
        "fetch, verify and serve a model",
        "Fetch, verify and serve a model. Ctrl-C stops; the same command goes on where it stopped.",
    )
    _add_source(up, optional=True)
    _add_manifest(up)
    _add_facts(up)
    _add_placement(up)
    _add_serving(up)
    up.add_argument(
        "--full",
        action="store_true",
        help="every node fetches the whole release, not only what its layers need",
    )
    up.add_argument(
        "--detach", action="store_true", help="leave it running and return when it serves"
    )

    demo = verb(
        "demo",
        "serve a small real model that is made and seeded on this machine",
        "Make a small real model, seed it, and serve it from its magnet link. Nothing is "
        "downloaded from the internet. Stays up until Ctrl-C.",
    )
    demo.add_argument(
        "--check", action="store_true", help="ask one question, print the answer, and stop"
    )
    demo.add_argument(
        "--seed-only", action="store_true", help="make and seed the model but do not serve it"
    )
    _add_store(demo)
    _add_placement(demo)
    _add_serving(demo)

    plan = verb("plan", "print where a model would run; changes nothing")
    _add_source(plan, optional=True)
    _add_manifest(plan)
    _add_facts(plan)
    _add_placement(plan)
    plan.add_argument("--max-concurrency", type=_positive, metavar="N", help=_CONCURRENCY_HELP)
    plan.add_argument(
        "--inventory",
        metavar="FILE",
        help="plan for the machines of this file, as `magnetar nodes -o yaml` writes it",
    )
    plan.add_argument(
        "--diff",
        nargs="?",
        const="",
        metavar="NAME",
        help="print what would move of the deployment that runs (of this name, else of the "
        "manifest's or the model's)",
    )
    plan.add_argument(
        "--from-traffic",
        action="store_true",
        help="plan for the experts that the running deployment chose, and say what that gains; "
        "implies --diff",
    )
    plan.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "yaml", "svg"),
        default="table",
        help="form of what is printed; svg is a picture",
    )

    nodes = verb(
        "nodes",
        "measure the machines there are to plan with",
        "Measure this machine, or every node of a Ray cluster and the links between them. Later "
        "plans use what was measured.",
    )
    nodes.add_argument("--again", action="store_true", help="measure even what was measured before")
    _add_ray_address(nodes)
    nodes.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "yaml"),
        default="table",
        help="form of what is printed; yaml is an inventory file",
    )

    fetch = verb("fetch", "download and verify a release, or a part; prints its folder")
    _add_source(fetch, optional=True)
    _add_manifest(fetch)
    fetch.add_argument(
        "--only",
        metavar="LAYERS[/EXPERTS]",
        help="these layers, for example 0-7, and of their experts these, for example 0-31/2,5",
    )
    fetch.add_argument(
        "--dry-run", action="store_true", help="print what would be fetched, and fetch no more"
    )
    _add_facts(fetch)
    fetch.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="take from the nodes of this Ray cluster what they hold, before asking outside",
    )
    _add_output(fetch)

    verify = verb(
        "verify",
        "check every byte of a release against its hashes",
        "Check every byte of a release against its hashes. What is bad or missing of a torrent is "
        "fetched again.",
    )
    _add_source(verify)
    _add_network(verify)

    seed = verb("seed", "share a release folder; prints its magnet link")
    seed.add_argument("folder", metavar="DIR", help="folder of a complete release")
    seed.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="address to listen on"
    )
    seed.add_argument(
        "--format",
        choices=get_args(TorrentFormat),
        default="v1",
        help="of the torrent: v1 is read by every client, v2 has a hash tree for each file, hybrid "
        "is both (v1)",
    )
    _add_urls(seed)
    seed.add_argument(
        "--private",
        action="store_true",
        help="peers find each other by the trackers alone: no DHT, no peer exchange",
    )
    seed.add_argument("--torrent", metavar="FILE", help="write the .torrent file here as well")
    seed.add_argument(
        "--upload-limit",
        type=_rate,
        default=0,
        metavar="RATE",
        help="send at most so much a second, for example 500kB or 5MB (no limit)",
    )
    seed.add_argument(
        "--ratio",
        type=_positive_float,
        metavar="X",
        help="stop when so many times the files' bytes were sent",
    )
    seed.add_argument(
        "--stop-after",
        type=_duration,
        metavar="TIME",
        help="stop after this time, for example 90s, 30m, 12h or 7d",
    )
    seed.add_argument(
        "--stop-on-eof", action="store_true", help="stop when standard input is closed"
    )
    _add_store(seed)
    _add_output(seed)

    inspect = verb("inspect", "print the facts and the tensors of a release")
    _add_source(inspect)
    _add_facts(inspect)
    inspect.add_argument(
        "--nodes", type=_positive, metavar="N", help="also what each of N nodes would fetch"
    )
    _add_output(inspect)

    store = verb(
        "store",
        "list, check or delete what the store holds, or print the folder of a release",
        "ls lists the releases, path prints the folder of one. verify hashes all that is on "
        "record, of one or of all, names what is damaged and has the next fetch bring it again. "
        "gc deletes releases that no deployment uses and that nobody has used for long.",
    )
    store.add_argument("action", choices=("ls", "path", "gc", "verify"), help="what to do")
    store.add_argument(
        "release", nargs="?", metavar="RELEASE", help="name or info-hash, for path and verify"
    )
    store.add_argument(
        "--dry-run", action="store_true", help="gc: say what would be deleted, and delete nothing"
    )
    store.add_argument(
        "--older-than",
        type=_age,
        metavar="TIME",
        help="gc: what was not used for this long, for example 12h or 7d; 0s is all (30d)",
    )
    _add_store(store)
    _add_output(store)

    status = verb("status", "print what is deployed")
    status.add_argument("name", nargs="?", metavar="NAME", help="only this deployment")
    _add_ray_address(status)
    _add_output(status)

    down = verb("down", "stop a deployment; what it downloaded is kept")
    down.add_argument("name", metavar="NAME", help="name of the deployment")
    _add_ray_address(down)
    return parser


def _add_common(parser: argparse._ActionsContainer, *, progress: str) -> None:
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


def _add_source(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    nargs: Literal["?"] | None = "?" if optional else None
    parser.add_argument("source", nargs=nargs, metavar="SOURCE", help=_SOURCE_HELP)


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="a manifest in place of SOURCE; options given here win over it",
    )


def _add_store(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--store", metavar="DIR", help="folder that keeps releases")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fetching")
    _add_store(group)
    group.add_argument(
        "--peer",
        action="append",
        type=_checked_by("split_peer"),
        metavar="HOST:PORT",
        help="a peer to ask besides those of the swarm; may be given several times",
    )
    _add_urls(group)
    group.add_argument(
        "--timeout",
        type=_positive_float,
        metavar="SECONDS",
        help="give up when nothing arrives for this long (wait for ever)",
    )
    group.add_argument(
        "--download-limit",
        type=_rate,
        metavar="RATE",
        help="take at most so much a second from outside, on each node, for example 20MB"
        " (no limit)",
    )
    group.add_argument(
        "--upload-limit",
        type=_rate,
        metavar="RATE",
        help="give at most so much a second to outside, on each node; 0 is no limit (4MiB)",
    )


def _add_urls(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--tracker",
        action="append",
        type=_checked_by("check_tracker"),
        metavar="URL",
        help="a tracker, which may be on your own network; may be given several times",
    )
    parser.add_argument(
        "--web-seed",
        action="append",
        type=_checked_by("check_web_seed"),
        metavar="URL",
        help="an HTTP server that holds the files too (BEP 19); may be given several times",
    )


def _add_facts(parser: argparse.ArgumentParser) -> None:
    _add_network(parser)
    group = parser.add_argument_group("facts that a release's own files may lack")
    group.add_argument(
        "--rope-theta", type=_positive_float, metavar="X", help="base of the rotary embedding"
    )
    group.add_argument(
        "--sliding-window",
        type=_window,
        metavar="TOKENS",
        help="how far attention looks back, or none",
    )
    group.add_argument(
        "--max-context",
        type=_positive,
        metavar="TOKENS",
        help="longest text, prompt and answer, to serve",
    )
    group.add_argument(
        "--chat-format", choices=get_args(ChatFormat), help="how messages become tokens"
    )


def _add_ray_address(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="an existing Ray cluster (one is started here)"
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--stages", type=_positive, metavar="N", help="parts to split the layers into (fewest)"
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
    _add_ray_address(group)


def _add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving")
    group.add_argument("--name", metavar="NAME", help="name of the deployment and of the model")
    group.add_argument("--host", metavar="HOST", help=f"address to listen on ({DEFAULT_HOST})")
    group.add_argument(
        "--port", type=_port, metavar="PORT", help=f"0 takes a free one ({DEFAULT_PORT})"
    )
    group.add_argument("--max-concurrency", type=_positive, metavar="N", help=_CONCURRENCY_HELP)
    group.add_argument(
        "--max-running",
        type=_positive,
        metavar="N",
        help="requests worked on at a time, most of them shorter (64, or --max-concurrency)",
    )
    group.add_argument(
        "--max-waiting",
        type=_natural,
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


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="form of what is printed"
    )


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port between 0 and 65535")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _rate(text: str) -> int:
    from ..fetcher.rates import parse_rate

    try:
        return parse_rate(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?([smhd]?)", text.strip())
    seconds = float(match[1]) * {"m": 60, "h": 3600, "d": 86400}.get(match[2], 1) if match else 0
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90s, 30m, 12h or 7d")
    return seconds


def _age(text: str) -> float:
    return 0.0 if text in ("0", "0s") else _duration(text)


def _window(text: str) -> int | Literal["none"]:
    return "none" if text == "none" else _positive(text)


def _checked_by(check: str) -> Callable[[str], str]:
    """A text that this function of `magnet` accepts; it is not needed for `--help`."""

    def checked(text: str) -> str:
        from ..fetcher.torrent import magnet

        try:
            getattr(magnet, check)(text.strip())
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text.strip()

    return checked
