"""The verbs about what the store holds: `magnetar store ls | path | gc | verify`."""

import argparse
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import NotFoundError, UsageError, VerifyError
from .console import Console, json_text
from .option_groups import add_output, add_store
from .phases import format_bytes
from .values import age
from .verb import Verbs
from .wishes import store_of

if TYPE_CHECKING:
    from ..fetcher.store import Store, StoredRelease
    from ..fetcher.torrent.stored_check import StoredCheck

MAX_NAMED = 10
"""Damaged tensors that are named one by one where people read."""


def add_store_verb(verbs: Verbs) -> None:
    """`magnetar store` and its options."""
    parser = verbs.add(
        "store",
        store,
        "list, check or delete what the store holds, or print the folder of a release",
        "ls lists the releases, path prints the folder of one. verify hashes all that is on "
        "record, of one or of all, names what is damaged and has the next fetch bring it again. "
        "gc deletes releases that no deployment uses and that nobody has used for long.",
    )
    parser.add_argument("action", choices=("ls", "path", "gc", "verify"), help="what to do")
    parser.add_argument(
        "release", nargs="?", metavar="RELEASE", help="name or info-hash, for path and verify"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="gc: say what would be deleted, and delete nothing"
    )
    parser.add_argument(
        "--older-than",
        type=age,
        metavar="TIME",
        help="gc: what was not used for this long, for example 12h or 7d; 0s is all (30d)",
    )
    add_store(parser)
    add_output(parser)


def store(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Lists, checks or deletes the releases of the store, or prints the folder of one."""
    from ..fetcher.store import Store

    if args.release is not None and args.action in ("ls", "gc"):
        raise UsageError(f"magnetar store {args.action} takes no RELEASE")
    if args.release is None and args.action == "path":
        raise UsageError("write: magnetar store path RELEASE")
    if args.action != "gc" and (args.dry_run or args.older_than is not None):
        raise UsageError("--dry-run and --older-than belong to: magnetar store gc")
    _ACTIONS[args.action](Store(store_of(args)), args, console, stop)


def _ls(store: "Store", args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    held = store.releases()
    if args.output == "json":
        console.data(json_text([_told(release) for release in held]))
    elif held:
        console.data("\n".join(map(_line, held)))
    else:
        console.note("the store is empty; magnetar fetch SOURCE fills it")


def _path(
    store: "Store", args: argparse.Namespace, console: Console, stop: threading.Event
) -> None:
    folder = str(_named(store, args.release).folder)
    console.data(json_text({"folder": folder}) if args.output == "json" else folder)


def _gc(store: "Store", args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    from ..fetcher.garbage import DEFAULT_AGE_S, collect, sorted_out

    age_s = DEFAULT_AGE_S if args.older_than is None else args.older_than
    if args.dry_run:
        found = sorted_out(store, older_than_s=age_s)
    else:
        found = collect(store, older_than_s=age_s, stop=stop)
    freed = sum(each.release.num_bytes for each in found if not each.reason)
    if args.output == "json":
        told = [_told(each.release) | {"kept_because": each.reason} for each in found]
        console.data(json_text({"freed_bytes": freed, "dry_run": args.dry_run, "releases": told}))
        return
    verb = "would be deleted" if args.dry_run else "deleted"
    for each in found:
        console.data(f"{_line(each.release)}: {f'kept, {each.reason}' if each.reason else verb}")
    console.note(f"{format_bytes(freed)} {'would be ' if args.dry_run else ''}freed")


def _verify(
    store: "Store", args: argparse.Namespace, console: Console, stop: threading.Event
) -> None:
    from ..fetcher.torrent.stored_check import check_stored

    chosen = store.releases() if args.release is None else (_named(store, args.release),)
    checks = []
    for release in chosen:
        checks.append(
            check_stored(
                store.release_folder(release.info_hash),
                on_progress=console.progress,
                stop=stop,
            )
        )
        if args.output != "json":
            console.data(_report(checks[-1]))
    if args.output == "json":
        console.data(json_text([asdict(check) | {"is_right": check.is_right} for check in checks]))
    if bad := [check for check in checks if not check.is_right]:
        names = ", ".join(check.name for check in bad)
        raise VerifyError(
            f"damaged: {names}; what is damaged counts as missing now: fetch it again, and only "
            "that is brought"
        )


def _report(check: "StoredCheck") -> str:
    head = f"{check.info_hash[:12]}  {check.name}: {check.num_pieces:,} pieces"
    if check.is_right:
        return f"{head}, {check.num_bytes:,} bytes, all right"
    lines = [f"{head}, {len(check.damaged_pieces):,} damaged"]
    lines += [
        f"  {part.file} bytes {part.offset:,} to {part.end:,}" for part in check.damaged[:MAX_NAMED]
    ]
    lines += [f"  {name}" for name in check.damaged_tensors[:MAX_NAMED]]
    if (more := len(check.damaged_tensors) - MAX_NAMED) > 0:
        lines.append(f"  and {more:,} more tensors")
    return "\n".join(lines)


def _named(store: "Store", name: str) -> "StoredRelease":
    held = store.releases()
    found = [each for each in held if name in (each.name, each.info_hash)]
    if len(found) != 1:
        names = ", ".join(f"{each.name} ({each.info_hash})" for each in found or held)
        what = "several releases" if found else "no release"
        raise NotFoundError(f"the store has {what} called {name!r}; there is {names or 'nothing'}")
    return found[0]


def _told(release: "StoredRelease") -> dict[str, object]:
    return asdict(release) | {"folder": str(release.folder)}


def _line(release: "StoredRelease") -> str:
    return (
        f"{release.info_hash[:12]}  {release.num_bytes:>16,} bytes  "
        f"{'whole' if release.complete else 'part '}  {release.name}"
    )


_ACTIONS: Mapping[str, Callable[["Store", argparse.Namespace, Console, threading.Event], None]] = {
    "ls": _ls,
    "path": _path,
    "gc": _gc,
    "verify": _verify,
}
