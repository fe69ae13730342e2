"""The body of each command: arguments in, parts called in order, data out."""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster.spec import DeploymentSpec, SourceSpec
from ..errors import InterruptedByUserError, NotFoundError, UsageError
from ..fetcher.config import ReleaseHints
from ..fetcher.progress import Progress
from ..fetcher.rates import RateLimits
from ..settings import default_store
from .console import Console
from .demo import demo
from .nodes import nodes
from .plan_output import shown_plan
from .serving import need_importable_package, serving, status_table
from .stored import store

if TYPE_CHECKING:
    from ..fetcher.fetch import Fetch
    from ..fetcher.torrent.seed import SeedInfo

Command = Callable[[argparse.Namespace, Console, threading.Event], None]


def up(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Fetches, verifies and serves; stays until it is told to stop, unless detached."""
    spec, ray_address = wanted(args, console)
    with serving(spec, console, stop, ray_address=ray_address, detach=args.detach) as endpoint:
        if args.detach:
            console.note(f"{spec.name} goes on by itself; stop it with: magnetar down {spec.name}")
            return
        endpoint.wait()
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

    source, store = _source(args, console), Store(_store(args))
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
        cache=_store(args),
        on_progress=telling,
    )
    console.note(f"no longer shared: {ended}")


def inspect(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Prints the facts and the tensors of a release, from its heads and tails alone."""
    from ..fetcher.checkpoint.release_view import release_json, release_table
    from ..fetcher.split import split_costs, split_json, split_table

    source = _source(args, console)
    with fetching(source, _store(args), console, stop) as fetch:
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


def wanted(args: argparse.Namespace, console: Console) -> tuple[DeploymentSpec, str | None]:
    """The deployment that a manifest or SOURCE asks for, and the Ray cluster to use.

    Options of the command line win over the manifest.
    """
    from ..manifests.load import load_deployment
    from ..manifests.source import deployment_name, release_name

    if (args.file is None) == (args.source is None):
        raise UsageError("give either SOURCE or -f FILE")
    ray_address: str | None = args.ray_address
    if args.file is not None:
        file = Path(args.file).expanduser()
        deployment = load_deployment(file, environment=os.environ)
        spec = deployment.to_spec(base=file.absolute().parent, on_note=console.note)
        ray_address = ray_address or deployment.spec.placement.ray_address
    else:
        source = _source(args, console)
        model_name = release_name(source)
        spec = DeploymentSpec(
            name=deployment_name(model_name),
            source=source,
            store=str(_store(args)),
            model_name=model_name,
        )
    return with_options(spec, args), ray_address


def with_options(spec: DeploymentSpec, args: argparse.Namespace) -> DeploymentSpec:
    """``spec`` with what was given on the command line in place of its own."""
    from ..manifests.source import deployment_name

    options = vars(args)
    source = replace(
        spec.source,
        peers=_both(spec.source.peers, options.get("peer")),
        trackers=_both(spec.source.trackers, options.get("tracker")),
        web_seeds=_both(spec.source.web_seeds, options.get("web_seed")),
        timeout_s=options.get("timeout") or spec.source.timeout_s,
        given=_given(args, spec.source.given),
        limits=_limits(args, spec.source.limits),
    )
    changes = {
        "store": options.get("store") and str(_store(args)),
        "dtype": options.get("dtype"),
        "batch_invariant": options.get("batch_invariant"),
        "num_stages": options.get("stages"),
        "objective": options.get("objective"),
        "max_context_tokens": options.get("max_context"),
        "max_concurrency": options.get("max_concurrency"),
        "max_running": options.get("max_running"),
        "max_waiting": options.get("max_waiting"),
        "host": options.get("host"),
        "port": options.get("port"),
        "api_key_file": options.get("api_key_file") and str(Path(args.api_key_file).absolute()),
        "model_name": options.get("name"),
        "name": options.get("name") and deployment_name(args.name),
        "fetch_full": options.get("full") or None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(spec, source=source, **given)  # type: ignore[arg-type]


@contextlib.contextmanager
def fetching(
    source: SourceSpec,
    store: Path,
    console: Console,
    stop: threading.Event,
    *,
    ray_address: str | None = None,
) -> "Iterator[Fetch]":
    """A `Fetch` of the source, closed at the end; what a Ray cluster holds comes from there."""
    from ..fetcher.fetch import Fetch

    fetch = Fetch(
        kind=source.kind,
        location=source.location,
        store=store,
        peers=source.peers,
        trackers=source.trackers,
        web_seeds=source.web_seeds,
        timeout_s=source.timeout_s,
        on_progress=console.progress,
        stop=stop,
        limits=source.limits,
    )
    with contextlib.closing(fetch):
        if ray_address is not None and (info_hash := fetch.identify()) is not None:
            from ..serve.launch import lenders

            found, lan_address = lenders(info_hash, ray_address=ray_address)
            fetch.borrow(found, lan_address=lan_address)
        yield fetch


def _source(args: argparse.Namespace, console: Console) -> SourceSpec:
    from ..manifests.source import resolve_source

    source = resolve_source(
        args.source,
        peers=tuple(args.peer or ()),
        timeout_s=args.timeout,
        given=_given(args, ReleaseHints()),
        on_note=console.note,
    )
    return replace(
        source,
        trackers=tuple(args.tracker or ()),
        web_seeds=tuple(args.web_seed or ()),
        limits=_limits(args, RateLimits()),
    )


def _both(before: tuple[str, ...], given: list[str] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*before, *(given or ()))))


def _limits(args: argparse.Namespace, before: RateLimits) -> RateLimits:
    options = vars(args)
    down, up = options.get("download_limit"), options.get("upload_limit")
    return RateLimits(
        download_bytes_per_s=before.download_bytes_per_s if down is None else down,
        upload_bytes_per_s=before.upload_bytes_per_s if up is None else up,
    )


def _given(args: argparse.Namespace, before: ReleaseHints) -> ReleaseHints:
    options = vars(args)
    return ReleaseHints(
        rope_theta=options.get("rope_theta") or before.rope_theta,
        sliding_window=options.get("sliding_window") or before.sliding_window,
        max_context_tokens=options.get("max_context") or before.max_context_tokens,
        chat_format=options.get("chat_format") or before.chat_format,
    )


def _store(args: argparse.Namespace) -> Path:
    return Path(args.store).expanduser().absolute() if args.store else default_store()


def _stop_on_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


def _json(value: object) -> str:
    return json.dumps(value, indent=2) if sys.stdout.isatty() else json.dumps(value)
