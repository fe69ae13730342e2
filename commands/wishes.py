"""What the options of a command ask for: a deployment, a source, a store."""

import argparse
import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.plan import NodeWish
from ..cluster.spec import DeploymentSpec, SourceSpec
from ..errors import UsageError
from ..fetcher.config import ReleaseHints
from ..fetcher.rates import RateLimits
from ..settings import default_store
from .console import Console

if TYPE_CHECKING:
    from ..fetcher.fetch import Fetch


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
        source = source_of(args, console)
        model_name = release_name(source)
        spec = DeploymentSpec(
            name=deployment_name(model_name),
            source=source,
            store=str(store_of(args)),
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
        "store": options.get("store") and str(store_of(args)),
        "dtype": options.get("dtype"),
        "batch_invariant": options.get("batch_invariant"),
        "num_stages": options.get("stages"),
        "num_pipelines": options.get("pipelines"),
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
        "node_wishes": _node_wishes(args, spec.node_wishes),
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
    from ..cluster.deployment.source_fetch import fetch_of

    fetch = fetch_of(source, store, on_progress=console.progress, stop=stop)
    with contextlib.closing(fetch):
        if ray_address is not None and (info_hash := fetch.identify()) is not None:
            from ..serve.launch import lenders

            found, lan_address = lenders(info_hash, ray_address=ray_address)
            fetch.borrow(found, lan_address=lan_address)
        yield fetch


def source_of(args: argparse.Namespace, console: Console) -> SourceSpec:
    """The release that SOURCE names, with what was said of how to fetch it."""
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


def _node_wishes(
    args: argparse.Namespace, before: tuple[NodeWish, ...]
) -> tuple[NodeWish, ...] | None:
    """Those of the command line, each in place of what the manifest has for its node."""
    options = vars(args)
    given: dict[str, NodeWish] = {}

    def wish(host: str, **changes: Any) -> None:
        given[host] = replace(given.get(host, NodeWish(host=host)), **changes)

    for host in options.get("exclude") or ():
        wish(host, exclude=True)
    for host, limit_bytes in options.get("limit") or ():
        wish(host, memory_bytes=limit_bytes)
    for host, layers in options.get("pin") or ():
        wish(host, layers=layers)
    if not given:
        return None
    return (*(each for each in before if each.host not in given), *given.values())


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


def store_of(args: argparse.Namespace) -> Path:
    """The folder that keeps releases."""
    return Path(args.store).expanduser().absolute() if args.store else default_store()
