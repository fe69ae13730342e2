"""The verbs for deployments: ``up``, ``status`` and ``down``."""

import argparse
import threading

from ..errors import InterruptedByUserError
from .console import Console, json_text
from .option_groups import (
    add_facts,
    add_manifest,
    add_output,
    add_placement,
    add_ray_address,
    add_serving,
    add_source,
)
from .serving import serving, status_table
from .verb import Verbs
from .wishes import wanted

_RAY_HELP = "the Ray cluster it is on (that which the deployment was started with)"


def add_up(verbs: Verbs) -> None:
    """`magnetar up` and its options."""
    parser = verbs.add(
        "up",
        up,
        "fetch, verify and serve a model",
        "Fetch, verify and serve a model. Ctrl-C stops; the same command goes on where it stopped.",
    )
    add_source(parser, optional=True)
    add_manifest(parser)
    add_facts(parser)
    add_placement(parser)
    add_serving(parser)
    parser.add_argument(
        "--full",
        action="store_true",
        help="every node fetches the whole release, not only what its layers need",
    )
    parser.add_argument(
        "--detach", action="store_true", help="leave it running and return when it serves"
    )


def up(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Fetches, verifies and serves; stays until it is told to stop, unless detached."""
    spec, ray_address = wanted(args, console)
    with serving(spec, console, stop, ray_address=ray_address, detach=args.detach) as endpoint:
        if args.detach:
            console.note(f"{spec.name} goes on by itself; stop it with: magnetar down {spec.name}")
            return
        endpoint.wait(on_warning=console.warning, on_note=console.note)
    if stop.is_set():
        raise InterruptedByUserError("stopped; what was downloaded and verified is kept")


def add_status(verbs: Verbs) -> None:
    """`magnetar status` and its options."""
    parser = verbs.add("status", status, "print what is deployed", ends_at_once=True)
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this deployment")
    add_ray_address(parser, _RAY_HELP)
    add_output(parser)


def status(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints what is deployed."""
    from ..serve.launch import status as ask

    found = ask(args.name, ray_address=args.ray_address)
    if args.output == "json":
        console.data(json_text(found if args.name is None else found[0]))
    elif found:
        console.data(status_table(found, details=args.name is not None))
    else:
        console.note("nothing is deployed; magnetar up SOURCE deploys")


def add_down(verbs: Verbs) -> None:
    """`magnetar down` and its options."""
    parser = verbs.add(
        "down", down, "stop a deployment; what it downloaded is kept", ends_at_once=True
    )
    parser.add_argument("name", metavar="NAME", help="name of the deployment")
    add_ray_address(parser, _RAY_HELP)


def down(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Stops a deployment; what it downloaded is kept."""
    from ..serve.launch import down as end

    end(args.name, ray_address=args.ray_address)
    console.note(f"{args.name} is down")
