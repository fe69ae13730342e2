"""The verbs for releases: ``fetch``, ``verify`` and ``inspect``."""

import argparse
import threading
from pathlib import Path

from ..errors import NotFoundError
from .console import Console, json_text
from .option_groups import (
    add_facts,
    add_manifest,
    add_network,
    add_output,
    add_ray_address,
    add_source,
)
from .values import positive
from .verb import Verbs
from .wishes import fetching, source_of, store_of, wanted


def add_fetch(verbs: Verbs) -> None:
    """`magnetar fetch` and its options."""
    parser = verbs.add(
        "fetch", fetch, "download and verify a release, or a part; prints its folder"
    )
    add_source(parser, optional=True)
    add_manifest(parser)
    parser.add_argument(
        "--only",
        metavar="LAYERS[/EXPERTS]",
        help="these layers, for example 0-7, and of their experts these, for example 0-31/2,5",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be fetched, and fetch no more"
    )
    add_facts(parser)
    add_ray_address(
        parser, "take from the nodes of this Ray cluster what they hold, before asking outside"
    )
    add_output(parser)


def fetch(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Downloads and verifies a release, or a part of one, into the store."""
    from ..cluster.inventory.inventory import host_label
    from ..fetcher.only import parse_only
    from ..fetcher.piece_map import ranges_of

    spec, ray_address = wanted(args, console)
    source, store = spec.source, Path(spec.store.replace("{host}", host_label())).expanduser()
    only = None if args.only is None else parse_only(args.only)
    with fetching(source, store, console, stop, ray_address=ray_address) as fetch:
        fetch.metadata(waits=True)
        if only is not None:
            facts = fetch.facts(given=source.given, known=source.known)
            fetch.restrict(ranges_of(only.tensors(facts.index)))
        if args.dry_run:
            outlook = fetch.outlook()
            json_wanted = args.output == "json"
            console.data(json_text(outlook.to_json()) if json_wanted else outlook.table())
            return
        fetch.check_disk()
        folder = fetch.download()
        fetch.verify()
    console.data(json_text({"folder": str(folder)}) if args.output == "json" else str(folder))


def add_verify(verbs: Verbs) -> None:
    """`magnetar verify` and its options."""
    parser = verbs.add(
        "verify",
        verify,
        "check every byte of a release against its hashes",
        "Check every byte of a release against its hashes. What is bad or missing of a torrent is "
        "fetched again.",
    )
    add_source(parser)
    add_network(parser)


def verify(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Reads every byte of a release again; what is bad or missing of a torrent is fetched."""
    from ..fetcher.record import Record
    from ..fetcher.store import Store

    source, store = source_of(args, console), Store(store_of(args))
    with fetching(source, store.root, console, stop) as fetch:
        held = {release.info_hash for release in store.releases()}
        if fetch.info_hash is not None and fetch.info_hash not in held:
            raise NotFoundError(
                f"{store.root} does not hold the release {fetch.info_hash}: fetch it first"
            )
        fetch.metadata(waits=True)
        # What was verified before counts for nothing now.
        if fetch.info_hash is None:
            store.folder_record(Path(source.location)).write(Record())
        else:
            store.release_folder(fetch.info_hash).record.write(Record())
        fetch.verify()
        console.data(str(fetch.download()))


def add_inspect(verbs: Verbs) -> None:
    """`magnetar inspect` and its options."""
    parser = verbs.add(
        "inspect", inspect, "print the facts and the tensors of a release", ends_at_once=True
    )
    add_source(parser)
    add_facts(parser)
    parser.add_argument(
        "--nodes", type=positive, metavar="N", help="also what each of N nodes would fetch"
    )
    add_output(parser)


def inspect(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints the facts and the tensors of a release, from its heads and tails alone."""
    from ..fetcher.checkpoint.release_view import release_json, release_table
    from ..fetcher.split import split_costs, split_json, split_table

    source = source_of(args, console)
    with fetching(source, store_of(args), console, stop) as fetch:
        look = fetch.look(given=source.given, known=source.known)
        if look is None:
            fetch.metadata(waits=True)
            facts = fetch.facts(given=source.given, known=source.known)
            sizes, own = fetch.sizes(), fetch.piece_map()
        else:
            facts, sizes, own = look.facts, look.sizes, look.piece_map
    told, table = release_json(facts), release_table(facts)
    if args.nodes is not None:
        costs = split_costs(facts.index, sizes, args.nodes, own)
        told["split"] = split_json(costs)
        table += "\n\n" + split_table(costs, has_own=own is not None)
    console.data(json_text(told) if args.output == "json" else table)
