"""Making a torrent of a folder: version 1 (BEP 3), version 2 (BEP 52), or both in one."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InterruptedByUserError, NotFoundError, ReleaseError, UsageError
from .bencode import Bencoded, encode
from .formats import TorrentFormat
from .merkle import BLOCK_BYTES, file_root, next_power_of_two, piece_hash
from .metainfo import parse_metainfo

MAX_CHOSEN_PIECE_BYTES = 16 << 20
MAX_CHOSEN_PIECES = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: str
    size: int
    sha1: bytes
    """Of its pieces in version 1, the last filled up with zeros."""
    pieces: tuple[bytes, ...]
    """Roots of its pieces in version 2."""
    root: bytes


def create_torrent(
    folder: Path,
    *,
    format: TorrentFormat = "v1",
    piece_length: int | None = None,
    trackers: Iterable[str] = (),
    web_seeds: Iterable[str] = (),
    private: bool = False,
    on_hashed: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """A .torrent of every file below `folder` whose name does not begin with a dot.

    Reads everything once; `on_hashed` gets bytes done and bytes in all, after each piece.

    Raises:
        NotFoundError: no such folder. UsageError: nothing in it, or a name others would refuse.
        InterruptedByUserError: `stop` was set.
    """
    paths = tuple(listing(folder))
    sizes = [(folder / path).stat().st_size for path in paths]
    total = sum(sizes)
    if not total:
        raise UsageError(f"{folder} holds no bytes to share")
    if len(paths) == 1 and format != "v1":
        raise UsageError(
            f"{folder} holds one file, and version 2 cannot tell a folder from a file of its own: "
            "use --format v1"
        )
    piece_length = piece_length or _fitting_piece_length(total, format)
    done = 0

    def note(num_bytes: int) -> None:
        nonlocal done
        if stop is not None and stop.is_set():
            raise InterruptedByUserError("stopped while hashing the files; run it again to share")
        done += num_bytes
        if on_hashed is not None:
            on_hashed(done, total)

    info: dict[bytes, Bencoded] = {
        b"name": folder.resolve().name.encode(),
        b"piece length": piece_length,
    }
    if private:
        info[b"private"] = 1
    root: dict[bytes, Bencoded] = {b"info": info}
    if format == "v1":
        info[b"files"] = [_v1_entry(*each) for each in zip(paths, sizes, strict=True)]
        pieces = _chunks([folder / path for path in paths], piece_length)
        info[b"pieces"] = b"".join(hashlib.sha1(_noted(piece, note)).digest() for piece in pieces)
    else:
        hashed = [_hashed(folder, path, piece_length, note) for path in paths]
        info |= {b"meta version": 2, b"file tree": _file_tree(hashed)}
        if format == "hybrid":
            info |= _aligned_v1(hashed, piece_length)
        root[b"piece layers"] = {
            file.root: b"".join(file.pieces) for file in hashed if len(file.pieces) > 1
        }
    if done != total or [(folder / path).stat().st_size for path in paths] != sizes:
        raise ReleaseError(f"the files in {folder} changed while they were read: try again")
    if tiers := [[tracker.encode()] for tracker in trackers]:
        root[b"announce"] = tiers[0][0]
        root[b"announce-list"] = [list[Bencoded](tier) for tier in tiers]
    if urls := [url.encode() for url in web_seeds]:
        root[b"url-list"] = list[Bencoded](urls)
    raw = encode(root)
    parse_metainfo(raw)  # What we would refuse from others we do not give to them either.
    return raw


def listing(folder: Path) -> Iterator[str]:
    """Every shareable file below a folder as a relative path with forward slashes.

    In the order of version 2's file tree: by the bytes of the names, folder by folder. Links to
    files count as the files; linked folders and names with a leading dot are left out.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}")
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{path}" for path in listing(folder / entry.name))
        elif entry.is_file():
            yield entry.name


def _fitting_piece_length(total: int, format: TorrentFormat) -> int:
    # From web seeds libtorrent 2.1.1 never completes version 2 pieces of a single block.
    length = BLOCK_BYTES if format == "v1" else 2 * BLOCK_BYTES
    while length < MAX_CHOSEN_PIECE_BYTES and total / length > MAX_CHOSEN_PIECES:
        length *= 2
    return length


def _v1_entry(path: str, size: int) -> dict[bytes, Bencoded]:
    return {b"length": size, b"path": [part.encode() for part in path.split("/")]}


def _noted(piece: bytes, note: Callable[[int], None]) -> bytes:
    note(len(piece))
    return piece


def _hashed(folder: Path, path: str, piece_length: int, note: Callable[[int], None]) -> _File:
    """One file, read once for both versions."""
    sha1 = bytearray()
    pieces: list[bytes] = []
    size = 0
    num_blocks = piece_length // BLOCK_BYTES
    for piece in _chunks([folder / path], piece_length):
        note(len(piece))
        size += len(piece)
        sha1 += hashlib.sha1(piece.ljust(piece_length, b"\0")).digest()
        if len(piece) == size < piece_length:  # The only piece: a tree of the blocks there are.
            num_blocks = next_power_of_two(-(-size // BLOCK_BYTES))
        pieces.append(piece_hash(piece, num_blocks=num_blocks))
    root = file_root(pieces, blocks_per_piece=num_blocks) if pieces else b""
    return _File(path=path, size=size, sha1=bytes(sha1), pieces=tuple(pieces), root=root)


def _file_tree(files: Iterable[_File]) -> dict[bytes, Bencoded]:
    tree: dict[bytes, Any] = {}
    for file in files:
        below = tree
        for part in file.path.split("/"):
            below = below.setdefault(part.encode(), {})
        below[b""] = {b"length": file.size} | ({b"pieces root": file.root} if file.root else {})
    return tree


def _aligned_v1(files: list[_File], piece_length: int) -> dict[bytes, Bencoded]:
    """The same files for version 1, each filled up to whole pieces with padding (BEP 47).

    The last one too: libtorrent does, and then one folder has one hash whoever makes the torrent.
    """
    entries: list[Bencoded] = []
    for file in files:
        entries.append(_v1_entry(file.path, file.size))
        padding = -file.size % piece_length
        if padding:
            name = str(padding).encode()
            entries.append({b"attr": b"p", b"length": padding, b"path": [b".pad", name]})
    return {b"files": entries, b"pieces": b"".join(file.sha1 for file in files)}


def _chunks(paths: list[Path], num_bytes: int) -> Iterator[bytes]:
    """The files' contents one after the other, cut into equal pieces."""
    rest = b""
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(num_bytes - len(rest)):
                rest += data
                if len(rest) == num_bytes:
                    yield rest
                    rest = b""
    if rest:
        yield rest
