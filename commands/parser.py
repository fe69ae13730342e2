"""The whole command line: what stands before the verb, and all verbs."""

import argparse

from .. import __version__
from .demo import add_demo
from .deployments import add_down, add_status, add_up
from .nodes import add_nodes
from .option_groups import add_common
from .plans import add_plan
from .releases import add_fetch, add_inspect, add_verify
from .seeding import add_seed
from .stored import add_store_verb
from .verb import Parser, Verbs

_EXIT_CODES = """\
exit codes: 0 done, 1 failed, 2 usage or invalid manifest, 4 not found,
6 timed out, 7 it cannot work on this machine, 130 interrupted
"""
_VERBS = (
    add_up,
    add_demo,
    add_plan,
    add_nodes,
    add_fetch,
    add_verify,
    add_seed,
    add_inspect,
    add_store_verb,
    add_status,
    add_down,
)
"""In the order in which ``--help`` lists them."""


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options; options that were not given are None."""
    parser = Parser(
        prog="magnetar",
        description="From a magnet link to a served Mixture-of-Experts model.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"magnetar {__version__}")
    add_common(parser, progress="auto")
    verbs = Verbs(parser)
    for add in _VERBS:
        add(verbs)
    return parser
