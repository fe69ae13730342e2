"""`magnetar nodes`: what there is to compute on, how fast it is, and an inventory file of it."""

import argparse
import shutil
import sys
import threading
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..settings import default_store
from .console import Console, json_text
from .nodes_view import columns, nodes_table
from .option_groups import add_ray_address
from .serving import need_importable_package
from .verb import Verbs

if TYPE_CHECKING:
    from ..cluster.machines import Inventory


def add_nodes(verbs: Verbs) -> None:
    """`magnetar nodes` and its options."""
    parser = verbs.add(
        "nodes",
        nodes,
        "measure the machines there are to plan with",
        "Measure this machine, or every node of a Ray cluster and the links between them. Later "
        "plans use what was measured.",
        ends_at_once=True,
    )
    parser.add_argument(
        "--again", action="store_true", help="measure even what was measured before"
    )
    parser.add_argument(
        "--profiles",
        action="store_true",
        help="measure nothing: show the named devices that inventory files may have, with sources",
    )
    add_ray_address(parser, "measure the nodes of this Ray cluster (this machine alone)")
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "yaml"),
        default="table",
        help="form of what is printed; yaml is an inventory file",
    )


def nodes(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Measures this machine, or every node of a Ray cluster and the links between them."""
    if args.profiles:
        console.data(shown_profiles(args.output))
        return
    from ..cluster.inventory.link_cache import remember_links
    from ..manifests.inventory_document import inventory_document

    console.note("measuring takes seconds; what was measured before is taken from the cache")
    if args.ray_address is None:
        inventory = _here(again=args.again)
    else:
        inventory = _of_ray(args.ray_address, again=args.again)
    remember_links(inventory)
    if args.output == "table":
        # Whoever parses lines gets them whole.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        console.data(nodes_table(inventory, width=width))
    elif args.output == "json":
        console.data(json_text(inventory_document(inventory)))
    else:
        import yaml

        console.data(yaml.safe_dump(inventory_document(inventory), sort_keys=False).rstrip())


def shown_profiles(output: str) -> str:
    """The named devices as aligned columns and where their figures come from, or as a document.

    Raises:
        UsageError: another form than these.
    """
    from dataclasses import asdict

    from ..cluster.inventory.profiles import profiles
    from ..cluster.units import gigabytes, milliseconds

    if output == "json":
        return json_text({name: asdict(profile) for name, profile in profiles().items()})
    if output != "table":
        raise UsageError("profiles are no inventory; leave out -o yaml")
    rows = [("profile", "kind", "memory", "reads", "by", "computes", "layer", "step")]
    rows += [
        (
            name,
            profile.device.kind,
            gigabytes(profile.device.memory_bytes),
            f"{profile.device.read_gbps:.1f} GB/s",
            "measuring" if profile.is_measured else "data sheet",
            f"{profile.device.gemm_gflops:.0f} GFLOP/s",
            milliseconds(profile.device.layer_overhead_s),
            milliseconds(profile.device.step_overhead_s),
        )
        for name, profile in profiles().items()
    ]
    sources = [f"{name}: {profile.source}" for name, profile in profiles().items()]
    around = {each.device.kind: each.overheads_source for each in profiles().values()}
    sources += [f"overheads of {kind}: {source}" for kind, source in around.items()]
    return "\n".join([*columns(rows), "", *sources])


def _here(*, again: bool) -> "Inventory":
    from ..cluster.inventory.inventory import host_label, probe_node
    from ..cluster.inventory.link_cache import remembered_links
    from ..cluster.inventory.link_probe import probe_itself
    from ..cluster.inventory.measure import measure_speeds
    from ..cluster.machines import Inventory
    from ..serve.gauge import ModelGauge

    node = probe_node(host_label(), "127.0.0.1", default_store())
    measured = measure_speeds(node, ModelGauge(), again=again)
    links = () if again else remembered_links((node,))
    return Inventory(nodes=(measured,), links=links or (probe_itself(node.host, node.address),))


def _of_ray(address: str, *, again: bool) -> "Inventory":
    need_importable_package()
    from ..cluster.runtime.ray_runtime import joined_ray, ray_nodes
    from ..cluster.runtime.survey import survey
    from ..serve.gauge import ModelGauge

    with joined_ray(address):
        return survey(ray_nodes(), ModelGauge, again=again)
