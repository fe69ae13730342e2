"""What may be asked on the command line: the verbs and the options of each.

Imported for ``magnetar --help``: nothing heavier than the standard library, and this package's
plain data.
"""

import argparse
import re
from typing import NoReturn, get_args

from .. import __version__
from ..fetcher.torrent.formats import TorrentFormat
from .option_groups import (
    CONCURRENCY_HELP,
    add_common,
    add_facts,
    add_manifest,
    add_network,
    add_output,
    add_placement,
    add_ray_address,
    add_serving,
    add_source,
    add_store,
    add_urls,
)
from .values import age, duration, positive, positive_float, rate

_EXIT_CODES = """\
exit codes: 0 done, 1 failed, 2 usage or invalid manifest, 4 not found, 6 timed out,
7 it cannot work on this machine, 130 interrupted
"""


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
    add_common(parser, progress="auto")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    common = _Parser(add_help=False)
    add_common(common.add_argument_group("output"), progress=argparse.SUPPRESS)

    def verb(name: str, help: str, description: str = "") -> argparse.ArgumentParser:
        text = description or help[0].upper() + help[1:] + "."
        return verbs.add_parser(name, help=help, description=text, parents=[common])

    up = verb(
        "up",
        "fetch, verify and serve a model",
        "Fetch, verify and serve a model. Ctrl-C stops; the same command goes on where it stopped.",
    )
    add_source(up, optional=True)
    add_manifest(up)
    add_facts(up)
    add_placement(up)
    add_serving(up)
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
    add_store(demo)
    add_placement(demo)
    add_serving(demo)

    plan = verb("plan", "print where a model would run; changes nothing")
    add_source(plan, optional=True)
    add_manifest(plan)
    add_facts(plan)
    add_placement(plan)
    plan.add_argument("--max-concurrency", type=positive, metavar="N", help=CONCURRENCY_HELP)
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
    add_ray_address(nodes)
    nodes.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "yaml"),
        default="table",
        help="form of what is printed; yaml is an inventory file",
    )

    fetch = verb("fetch", "download and verify a release, or a part; prints its folder")
    add_source(fetch, optional=True)
    add_manifest(fetch)
    fetch.add_argument(
        "--only",
        metavar="LAYERS[/EXPERTS]",
        help="these layers, for example 0-7, and of their experts these, for example 0-31/2,5",
    )
    fetch.add_argument(
        "--dry-run", action="store_true", help="print what would be fetched, and fetch no more"
    )
    add_facts(fetch)
    fetch.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="take from the nodes of this Ray cluster what they hold, before asking outside",
    )
    add_output(fetch)

    verify = verb(
        "verify",
        "check every byte of a release against its hashes",
        "Check every byte of a release against its hashes. What is bad or missing of a torrent is "
        "fetched again.",
    )
    add_source(verify)
    add_network(verify)

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
    add_urls(seed)
    seed.add_argument(
        "--private",
        action="store_true",
        help="peers find each other by the trackers alone: no DHT, no peer exchange",
    )
    seed.add_argument("--torrent", metavar="FILE", help="write the .torrent file here as well")
    seed.add_argument(
        "--upload-limit",
        type=rate,
        default=0,
        metavar="RATE",
        help="send at most so much a second, for example 500kB or 5MB (no limit)",
    )
    seed.add_argument(
        "--ratio",
        type=positive_float,
        metavar="X",
        help="stop when so many times the files' bytes were sent",
    )
    seed.add_argument(
        "--stop-after",
        type=duration,
        metavar="TIME",
        help="stop after this time, for example 90s, 30m, 12h or 7d",
    )
    seed.add_argument(
        "--stop-on-eof", action="store_true", help="stop when standard input is closed"
    )
    add_store(seed)
    add_output(seed)

    inspect = verb("inspect", "print the facts and the tensors of a release")
    add_source(inspect)
    add_facts(inspect)
    inspect.add_argument(
        "--nodes", type=positive, metavar="N", help="also what each of N nodes would fetch"
    )
    add_output(inspect)

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
        type=age,
        metavar="TIME",
        help="gc: what was not used for this long, for example 12h or 7d; 0s is all (30d)",
    )
    add_store(store)
    add_output(store)

    status = verb("status", "print what is deployed")
    status.add_argument("name", nargs="?", metavar="NAME", help="only this deployment")
    add_ray_address(status)
    add_output(status)

    down = verb("down", "stop a deployment; what it downloaded is kept")
    down.add_argument("name", metavar="NAME", help="name of the deployment")
    add_ray_address(down)
    return parser
