"""The verb ``plan``: table, JSON, YAML or picture of a plan, or what it would change."""

import argparse
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import UsageError
from .console import Console, json_text
from .option_groups import CONCURRENCY_HELP, add_facts, add_manifest, add_placement, add_source
from .serving import need_importable_package
from .values import positive
from .verb import Verbs
from .wishes import wanted

if TYPE_CHECKING:
    from ..cluster.spec import SourceSpec
    from ..fetcher.config import ModelConfig
    from ..fetcher.tensors import TensorIndex
    from ..serve.launch import PlanPreview

PlanOutput = Literal["table", "json", "yaml", "svg"]


def add_plan(verbs: Verbs) -> None:
    """`magnetar plan` and its options."""
    parser = verbs.add(
        "plan", plan, "print where a model would run; changes nothing", ends_at_once=True
    )
    add_source(parser, optional=True)
    add_manifest(parser)
    add_facts(parser)
    add_placement(parser, "plan for the nodes of this Ray cluster (this machine alone)")
    parser.add_argument("--max-concurrency", type=positive, metavar="N", help=CONCURRENCY_HELP)
    parser.add_argument(
        "--inventory",
        metavar="FILE",
        help="plan for the machines of this file, as `magnetar nodes -o yaml` writes it; of a "
        "release of the catalogue nothing is fetched then",
    )
    parser.add_argument(
        "--diff",
        nargs="?",
        const="",
        metavar="NAME",
        help="print what would move of the deployment that runs (of this name, else of the "
        "manifest's or the model's)",
    )
    parser.add_argument(
        "--from-traffic",
        action="store_true",
        help="plan for the experts that the running deployment chose, and say what that gains; "
        "implies --diff",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=get_args(PlanOutput),
        default="table",
        help="form of what is printed; svg is a picture",
    )


def plan(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints where a model would run; fetches no more than what describes it."""
    compares = args.diff is not None or args.from_traffic
    if compares and args.output == "svg":
        raise UsageError("there is no picture of a difference; leave out -o svg, or --diff")
    spec, ray_address = wanted(args, console)
    inventory = described = None
    if args.inventory is not None:
        from ..manifests.inventory import load_inventory

        described = _described(spec.source)
        inventory = load_inventory(Path(args.inventory).expanduser(), environment=os.environ)
    elif ray_address is not None:
        need_importable_package()
    from ..serve.launch import plan_only, running

    before = None
    if compares:
        before = running(args.diff or spec.name, ray_address=ray_address)
    preview = plan_only(
        spec,
        ray_address=ray_address,
        inventory=inventory,
        described=described,
        running=before,
        from_traffic=args.from_traffic,
        on_progress=console.progress,
        stop=stop,
    )
    console.data(shown_plan(preview, name=spec.name, output=args.output))


def _described(source: "SourceSpec") -> "tuple[ModelConfig, TensorIndex] | None":
    """What the catalogue says that the release consists of; None where it does not know it."""
    from ..fetcher.checkpoint.described import described_release
    from ..fetcher.torrent.magnet import parse_magnet
    from ..manifests.catalogue import listed

    if source.kind != "magnet":
        return None
    known = listed(parse_magnet(source.location).info_hash)
    if known is None:
        return None
    return described_release(known.params, known.dtype, given=source.given, known=source.known)


def shown_plan(preview: "PlanPreview", *, name: str, output: PlanOutput) -> str:
    """The plan itself, or what it would change of what runs, of which there is no picture."""
    from ..cluster.planning.diff_view import diff_json, diff_table
    from ..cluster.planning.plan_diff import plan_diff
    from ..cluster.planning.plan_picture import plan_svg
    from ..cluster.planning.plan_view import plan_json, plan_table

    if preview.running is not None:
        diff = plan_diff(preview.running, preview.plan, preview.index)
        notes = preview.explanation.notes
        if output == "table":
            return diff_table(diff, notes)
        return _document(diff_json(diff, notes), output)
    if output == "svg":
        num_experts = preview.config.num_experts
        return plan_svg(
            preview.plan, preview.explanation, num_experts=num_experts, title=name
        ).rstrip()
    if output == "table":
        # Whoever parses lines gets them whole.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return plan_table(preview.plan, preview.explanation, width=width, name=name)
    return _document(plan_json(preview.plan, preview.explanation, name=name), output)


def _document(told: dict[str, Any], output: PlanOutput) -> str:
    if output == "json":
        return json_text(told)
    import yaml

    class Dumper(yaml.SafeDumper):
        """With the ids of experts of a layer on one line."""

    def sequence(dumper: Dumper, values: list[Any]) -> yaml.Node:
        is_flat = all(isinstance(value, int) for value in values)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=is_flat)

    Dumper.add_representer(list, sequence)
    # By way of JSON, for YAML would mark tuples.
    plain = json.loads(json.dumps(told))
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, width=100).rstrip()
