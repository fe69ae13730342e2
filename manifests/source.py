"""What SOURCE means: a magnet link, a catalogue name, a .torrent file or a release folder."""

import re
from collections.abc import Callable
from pathlib import Path

from ..cluster.spec import SourceSpec
from ..errors import NotFoundError, UsageError
from ..fetcher.config import ReleaseHints
from .catalogue import find_release, known_hints, releases
from .suggest import did_you_mean

_INFO_HASH = re.compile(r"[0-9a-fA-F]{40}")


def resolve_source(
    text: str,
    *,
    peers: tuple[str, ...] = (),
    timeout_s: float | None = None,
    given: ReleaseHints | None = None,
    on_note: Callable[[str], None] | None = None,
) -> SourceSpec:
    """Finds out what ``text`` is and what the catalogue knows about it.

    A catalogue name goes before a folder of the same name; ``./NAME`` is the folder.
    ``on_note`` is told what was repaired or could have been meant otherwise.

    Raises:
        MagnetError: a magnet link beyond repair.
        NotFoundError: no file, folder or catalogue entry has that name.
        UsageError: a file that is no .torrent.
    """
    note = on_note or (lambda _: None)
    given = given or ReleaseHints()
    text = text.strip()
    if _is_magnet(text):
        return _magnet_source(text, peers=peers, timeout_s=timeout_s, given=given, note=note)
    path = Path(text).expanduser()
    if _is_catalogue_name(text):
        if path.exists():
            note(f"{text} is taken from the catalogue; write ./{text} for what lies in this folder")
        magnet = find_release(text).magnet
        return _magnet_source(magnet, peers=peers, timeout_s=timeout_s, given=given, note=note)
    if text and path.is_dir():
        return SourceSpec(
            kind="folder",
            location=str(path.absolute()),
            peers=peers,
            timeout_s=timeout_s,
            given=given,
        )
    if path.is_file():
        return SourceSpec(
            kind="torrent",
            location=str(path.absolute()),
            peers=peers,
            timeout_s=timeout_s,
            given=given,
            known=known_hints(_info_hash_of(path)),
        )
    if "/" in text or path.suffix == ".torrent" or not text:
        raise NotFoundError(f"there is no file or folder {text[:200]!r}: check the path")
    names = [alias for release in releases() for alias in (release.name, *release.aliases)]
    listed = ", ".join(release.name for release in releases())
    raise NotFoundError(
        f"{text[:80]!r} is no magnet link, no file or folder, and not in the catalogue "
        f"({listed}){did_you_mean(text, names)}"
    )


def release_name(source: SourceSpec) -> str:
    """A name for what the source holds: the catalogue's, else the torrent's or the folder's."""
    if source.kind == "folder":
        return Path(source.location).resolve().name or "model"
    if source.kind == "torrent":
        info_hash, name = _info_hash_of(Path(source.location)), Path(source.location).stem
    else:
        from ..fetcher.torrent.magnet import parse_magnet

        magnet = parse_magnet(source.location)
        info_hash, name = magnet.info_hash, magnet.name
    listed = (release.name for release in releases() if release.info_hash == info_hash)
    return next(listed, name or info_hash[:12])


def deployment_name(model_name: str) -> str:
    """A DNS label made of a model's name: ``Mistral_7B.v0.1`` becomes ``mistral-7b-v0-1``."""
    return re.sub(r"[^a-z0-9]+", "-", model_name.lower())[:63].strip("-") or "model"


def _is_magnet(text: str) -> bool:
    lower = text[:2048].lower()
    return lower.startswith("magnet:") or "urn:bt" in lower or bool(_INFO_HASH.fullmatch(text))


def _is_catalogue_name(text: str) -> bool:
    lower = text.lower()
    return any(lower in (release.name, *release.aliases) for release in releases())


def _magnet_source(
    text: str,
    *,
    peers: tuple[str, ...],
    timeout_s: float | None,
    given: ReleaseHints,
    note: Callable[[str], None],
) -> SourceSpec:
    from ..fetcher.torrent.magnet import parse_magnet

    magnet = parse_magnet(f"magnet:?xt=urn:btih:{text}" if _INFO_HASH.fullmatch(text) else text)
    for repair in magnet.repairs:
        note(f"magnet link: {repair}")
    return SourceSpec(
        kind="magnet",
        location=magnet.uri(),
        peers=peers,
        timeout_s=timeout_s,
        given=given,
        known=known_hints(magnet.info_hash),
    )


def _info_hash_of(path: Path) -> str:
    from ..fetcher.torrent.metainfo import parse_metainfo

    if path.suffix != ".torrent":
        raise UsageError(
            f"{path} is no .torrent file: give the folder of the release, a .torrent file, "
            "a magnet link or a name of the catalogue"
        )
    return parse_metainfo(path.read_bytes()).info_hash
