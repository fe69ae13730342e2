"""The body of each command: arguments in, parts called in order, data out."""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InterruptedByUserError, NotFoundError, UsageError
from ..fetcher.progress import Progress
from .console import Console
from .demo import demo
from .nodes import nodes
from .plan_output import shown_plan
from .serving import need_importable_package, serving, status_table
from .stored import store
from .wishes import fetching, source_of, store_of, wanted

if TYPE_CHECKING:
    from ..fetcher.torrent.seed import SeedInfo

Command = Callable[[argparse.Namespace, Console, threading.Event], None]


def up(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Fetches, verifies and serves; stays until it is told to stop, unless detached."""
    spec, ray_address = wanted(args, console)
    with serving(spec, console, stop, ray_address=ray_address, detach=args.detach) as endpoint:
        if args.detach:
            console.note(f"{spec.name} goes on by itself; stop it with: magnetar down {spec.name}")
            return
        endpoint.wait(on_warning=console.warning)
    if stop.is_set():
        raise InterruptedByUserError("stopped; what was downloaded and verified is kept")


def plan(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints where a model would run; fetches no more than what describes it."""
    spec, ray_address = wanted(args, console)
    inventory = None
    if args.inventory is not None:
        from ..manifests.inventory import load_inventory

        inventory = load_inventory(Path(args.inventory).expanduser(), environment=os.environ)
    elif ray_address is not None:
        need_importable_package()
    from ..serve.launch import plan_only, running

    before = None
    if args.diff is not None or args.from_traffic:
        before = running(args.diff or spec.name, ray_address=ray_address)
    preview = plan_only(
        spec,
        ray_address=ray_address,
        inventory=inventory,
        running=before,
        from_traffic=args.from_traffic,
        on_progress=console.progress,
        stop=stop,
    )
    console.data(shown_plan(preview, name=spec.name, output=args.output))


def fetch(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Downloads and verifies a release, or a part of one, into the store."""
    from ..cluster.inventory.inventory import host_label
    from ..fetcher.only import parse_only
    from ..fetcher.piece_map import ranges_of

    spec, ray_address = wanted(args, console)
    source, store = spec.source, Path(spec.store.replace("{host}", host_label())).expanduser()
    only = None if args.only is None else parse_only(args.only)
    with fetching(source, store, console, stop, ray_address=ray_address) as fetch:
        fetch.metadata()
        if only is not None:
            facts = fetch.facts(given=source.given, known=source.known)
            fetch.restrict(ranges_of(only.tensors(facts.index)))
        if args.dry_run:
            outlook = fetch.outlook()
            json_wanted = args.output == "json"
            console.data(_json(outlook.to_json()) if json_wanted else outlook.table())
            return
        fetch.check_disk()
        folder = fetch.download()
        fetch.verify()
    console.data(_json({"folder": str(folder)}) if args.output == "json" else str(folder))


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
        fetch.metadata()
        # What was verified before counts for nothing now.
        if fetch.info_hash is None:
            store.folder_record(Path(source.location)).write(Record())
        else:
            store.release_folder(fetch.info_hash).record.write(Record())
        fetch.verify()
        console.data(str(fetch.download()))


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
        console.data(_json(told) if args.output == "json" else useful)
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


def inspect(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints the facts and the tensors of a release, from its heads and tails alone."""
    from ..fetcher.checkpoint.release_view import release_json, release_table
    from ..fetcher.split import split_costs, split_json, split_table

    source = source_of(args, console)
    with fetching(source, store_of(args), console, stop) as fetch:
        fetch.metadata()
        facts = fetch.facts(given=source.given, known=source.known)
        sizes, own = fetch.sizes(), fetch.piece_map()
    told, table = release_json(facts), release_table(facts)
    if args.nodes is not None:
        costs = split_costs(facts.index, sizes, args.nodes, own)
        told["split"] = split_json(costs)
        table += "\n\n" + split_table(costs, has_own=own is not None)
    console.data(_json(told) if args.output == "json" else table)


def status(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints what is deployed."""
    from ..serve.launch import status as ask

    found = ask(args.name, ray_address=args.ray_address)
    if args.output == "json":
        console.data(_json(found if args.name is None else found[0]))
    elif found:
        console.data(status_table(found, details=args.name is not None))
    else:
        console.note("nothing is deployed; magnetar up SOURCE deploys")


def down(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Stops a deployment; what it downloaded is kept."""
    from ..serve.launch import down as end

    end(args.name, ray_address=args.ray_address)
    console.note(f"{args.name} is down")


COMMANDS: Mapping[str, Command] = {
    "up": up,
    "demo": demo,
    "plan": plan,
    "nodes": nodes,
    "fetch": fetch,
    "verify": verify,
    "seed": seed,
    "inspect": inspect,
    "store": store,
    "status": status,
    "down": down,
}


def _stop_on_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


def _json(value: object) -> str:
    return json.dumps(value, indent=2) if sys.stdout.isatty() else json.dumps(value)
