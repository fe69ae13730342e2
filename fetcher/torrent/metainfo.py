"""A torrent's metainfo: which files there are, where they lie among the pieces, and is it safe.

libtorrent sanitises paths by changing them; here an unsafe torrent is refused instead, because a
release whose files are not where its names say is of no use. BEP 3 (v1), BEP 52 (v2 and hybrid).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import ReleaseError
from .bencode import Bencoded, Decoder
from .magnet import TRACKER_SCHEMES, WEB_SEED_SCHEMES, allowed_url
from .merkle import BLOCK_BYTES

MAX_METAINFO_BYTES = 31_457_280
MAX_FILES = 20_000
MAX_PIECES = 2_097_152
MAX_PATH_DEPTH = 16
MAX_TOTAL_BYTES = 1 << 46
MAX_PIECE_BYTES = 32_767 * BLOCK_BYTES

_RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in "123456789"
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TorrentFile:
    """One file of a torrent."""

    path: str
    """Relative to the folder that the torrent is saved in, so it begins with the torrent's name."""
    length: int
    offset: int
    """First byte in the space that the pieces divide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metainfo:
    """What a torrent contains, checked."""

    info_hash: str
    """The v1 hash if there is one (40 hex digits), else the v2 hash (64)."""
    info_hashes: tuple[str, ...]
    """All of them; a hybrid torrent has both."""
    name: str
    files: tuple[TorrentFile, ...]
    """Without the padding that hybrid torrents have between files."""
    piece_length: int
    num_pieces: int
    total_bytes: int
    """Sum of the files' lengths."""
    raw: bytes
    """A .torrent of the info dictionary (and v2 piece layers) alone: nothing in it to call up."""
    is_private: bool = False
    """Peers may come from its trackers alone (BEP 27)."""
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()

    def file(self, path: str) -> TorrentFile:
        """The file of that path.

        Raises:
            ReleaseError: there is none.
        """
        for file in self.files:
            if file.path == path:
                return file
        raise ReleaseError(f"the torrent {self.name} has no file {path}")

    def pieces(self, file: TorrentFile, offset: int = 0, num_bytes: int | None = None) -> range:
        """The pieces that hold these bytes of the file; the whole file by default."""
        if num_bytes is None:
            num_bytes = file.length - offset
        if offset < 0 or num_bytes < 0 or offset + num_bytes > file.length:
            raise ReleaseError(
                f"{file.path} ends at byte {file.length}, before {offset}+{num_bytes}: "
                "the release is truncated"
            )
        if num_bytes == 0:
            return range(0)
        first = file.offset + offset
        return range(first // self.piece_length, (first + num_bytes - 1) // self.piece_length + 1)


def parse_metainfo(raw: bytes) -> Metainfo:
    """Reads a .torrent file.

    Raises:
        ReleaseError: malformed, absurd sizes, or anything unsafe: symlinks, absolute paths, ``..``,
            control characters, reserved or colliding names.
    """
    if len(raw) > MAX_METAINFO_BYTES:
        raise ReleaseError(f"torrent metadata of {len(raw)} bytes, more than {MAX_METAINFO_BYTES}")
    decoder = Decoder(raw)
    root = decoder.decode()
    if not isinstance(root, dict) or not isinstance(info := root.get(b"info"), dict):
        raise ReleaseError("this is no .torrent file: it has no info dictionary")
    start, end = decoder.spans[b"info"]
    info_raw = raw[start:end]
    is_v2 = info.get(b"meta version") == 2
    is_v1 = b"pieces" in info
    hashes = []
    if is_v1:
        hashes.append(hashlib.sha1(info_raw).hexdigest())
    if is_v2:
        hashes.append(hashlib.sha256(info_raw).hexdigest())
    if not hashes:
        raise ReleaseError("the torrent has no piece hashes of version 1 or 2")
    name = _component(info.get(b"name"))
    piece_length = _integer(info, b"piece length")
    if not BLOCK_BYTES <= piece_length <= MAX_PIECE_BYTES:
        raise ReleaseError(
            f"a piece length of {piece_length} bytes, outside {BLOCK_BYTES}..{MAX_PIECE_BYTES}"
        )
    listed = _v1_files(info, name) if is_v1 else _v2_files(info, name, piece_length)
    space = max((file.offset + file.length for file in listed), default=0)
    num_pieces = math.ceil(space / piece_length)
    if is_v1 and len(_bytes(info, b"pieces")) != 20 * num_pieces:
        raise ReleaseError(
            f"{len(_bytes(info, b'pieces')) // 20} piece hashes for {num_pieces} pieces"
        )
    if num_pieces > MAX_PIECES:
        raise ReleaseError(f"{num_pieces} pieces, more than {MAX_PIECES}")
    files = tuple(file for file in listed if file.path)
    _refuse_collisions(files)
    kept = b"d4:info" + info_raw
    if b"piece layers" in decoder.spans:
        first, last = decoder.spans[b"piece layers"]
        kept += b"12:piece layers" + raw[first:last]
    return Metainfo(
        info_hash=hashes[0],
        info_hashes=tuple(hashes),
        name=name,
        files=files,
        piece_length=piece_length,
        num_pieces=num_pieces,
        total_bytes=sum(file.length for file in files),
        raw=kept + b"e",
        is_private=info.get(b"private") == 1,
        trackers=_urls([root.get(b"announce"), root.get(b"announce-list")], TRACKER_SCHEMES),
        web_seeds=_urls([root.get(b"url-list")], WEB_SEED_SCHEMES),
    )


def _v1_files(info: dict[bytes, Bencoded], name: str) -> list[TorrentFile]:
    if b"length" in info:
        return [TorrentFile(path=name, length=_length(info), offset=0)]
    entries = info.get(b"files")
    if not isinstance(entries, list) or not entries:
        raise ReleaseError("the torrent lists no files")
    files = []
    offset = 0
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(parts := entry.get(b"path"), list):
            raise ReleaseError("the torrent lists a file without a path")
        length = _length(entry)
        is_padding = b"p" in _attributes(entry)
        path = "" if is_padding else _joined([name, *map(_component, parts)])
        files.append(TorrentFile(path=path, length=length, offset=offset))
        offset += length
        _refuse_excess(len(files), offset)
    return files


def _v2_files(info: dict[bytes, Bencoded], name: str, piece_length: int) -> list[TorrentFile]:
    files: list[TorrentFile] = []
    tree = info.get(b"file tree")
    if not isinstance(tree, dict) or not tree:
        raise ReleaseError("the torrent lists no files")
    offset = 0
    found = list(_leaves(tree, [name]))
    if len(found) == 1 and len(found[0][0]) == 2:
        found = [(found[0][0][1:], found[0][1])]  # A single file stands alone (BEP 52).
    for parts, entry in found:
        length = _length(entry)
        _attributes(entry)
        files.append(TorrentFile(path=_joined(parts), length=length, offset=offset))
        offset += math.ceil(length / piece_length) * piece_length
        _refuse_excess(len(files), offset)
    return files


def _leaves(
    tree: dict[bytes, Bencoded], parts: list[str]
) -> Iterator[tuple[list[str], dict[bytes, Bencoded]]]:
    for key in sorted(tree):
        below = tree[key]
        if not isinstance(below, dict):
            raise ReleaseError("the torrent's file tree is malformed")
        if key == b"":
            yield parts, below
        else:
            yield from _leaves(below, [*parts, _component(key)])


def _component(value: "Bencoded | None") -> str:
    """One name of a path, or ReleaseError when it could lead anywhere but down."""
    if not isinstance(value, bytes) or not value:
        raise ReleaseError("the torrent has a file without a name")
    try:
        name = value.decode()
    except UnicodeDecodeError as error:
        raise ReleaseError(f"the torrent names a file {value[:60]!r}, which is no UTF-8") from error
    reason = ""
    if name in (".", ".."):
        reason = "leads out of the folder"
    elif "/" in name or "\\" in name or ":" in name:
        reason = "has a path separator in it"
    elif not name.isprintable():
        reason = "has control characters in it"
    elif name.partition(".")[0].strip().lower() in _RESERVED_NAMES or name[-1] in ". ":
        reason = "is a reserved name on some systems"
    elif len(value) > 255:
        reason = "is too long"
    if reason:
        raise ReleaseError(
            f"unsafe torrent: the file name {name[:60]!r} {reason}; nothing was saved"
        )
    return name


def _joined(parts: list[str]) -> str:
    if not 1 <= len(parts) <= MAX_PATH_DEPTH:
        raise ReleaseError(f"unsafe torrent: a path with {len(parts)} parts; nothing was saved")
    return "/".join(parts)


def _refuse_collisions(files: tuple[TorrentFile, ...]) -> None:
    """No two files may be one on disk, and no file may be the folder of another."""
    seen: set[str] = set()
    folders: set[str] = set()
    for file in files:
        path = file.path.casefold()
        if path in seen:
            raise ReleaseError(f"unsafe torrent: {file.path} comes twice; nothing was saved")
        seen.add(path)
        parts = path.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    if clash := seen & folders:
        raise ReleaseError(
            f"unsafe torrent: {min(clash)} is a file and a folder; nothing was saved"
        )


def _refuse_excess(num_files: int, num_bytes: int) -> None:
    if num_files > MAX_FILES or num_bytes > MAX_TOTAL_BYTES:
        raise ReleaseError(
            f"absurd torrent: more than {MAX_FILES} files or {MAX_TOTAL_BYTES} bytes"
        )


def _attributes(entry: dict[bytes, Bencoded]) -> bytes:
    attributes = entry.get(b"attr", b"")
    if not isinstance(attributes, bytes) or b"l" in attributes or b"symlink path" in entry:
        raise ReleaseError("unsafe torrent: it contains a symbolic link; nothing was saved")
    return attributes


def _length(entry: dict[bytes, Bencoded]) -> int:
    length = _integer(entry, b"length")
    if not 0 <= length <= MAX_TOTAL_BYTES:
        raise ReleaseError(f"the torrent has a file of {length} bytes")
    return length


def _integer(entry: dict[bytes, Bencoded], key: bytes) -> int:
    if not isinstance(value := entry.get(key), int):
        raise ReleaseError(f"malformed torrent: {key.decode()} is no number")
    return value


def _bytes(entry: dict[bytes, Bencoded], key: bytes) -> bytes:
    if not isinstance(value := entry.get(key), bytes):
        raise ReleaseError(f"malformed torrent: {key.decode()} is no string")
    return value


def _urls(values: list["Bencoded | None"], schemes: tuple[str, ...]) -> tuple[str, ...]:
    """The allowed addresses among nested lists, each once."""
    kept: dict[str, None] = {}
    while values:
        value = values.pop(0)
        if isinstance(value, list):
            values[:0] = value
        elif isinstance(value, bytes) and allowed_url(
            url := value.decode(errors="replace"), schemes
        ):
            kept[url] = None
    return tuple(kept)
