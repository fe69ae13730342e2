"""Magnet links as people really paste them: repaired, filtered, and both said aloud."""

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote, unquote_plus, urlsplit

from ...errors import MagnetError, UsageError

MAX_LINK_CHARS = 65_536
MAX_TRACKERS = 100
MAX_PEERS = 200
TRACKER_SCHEMES = ("udp", "http", "https")
WEB_SEED_SCHEMES = ("http", "https")

_QUOTES = "\"'`<>“”‘’«»"
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(?:\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnet:
    """What a magnet link says, with only what is safe to follow."""

    info_hash: str
    """40 hex digits (v1, SHA-1) or 64 (a v2-only link, SHA-256), lower case."""
    info_hash_v2: str = ""
    """The second hash of a link that has both, to a hybrid torrent."""
    name: str = ""
    """Display name; never used as a path."""
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    """``HOST:PORT``, IPv6 hosts in brackets."""
    repairs: tuple[str, ...] = ()
    """Clauses for people: what was repaired and what was dropped, in order."""

    @property
    def info_hashes(self) -> tuple[str, ...]:
        """All that the link names, one or two."""
        return tuple(filter(None, (self.info_hash, self.info_hash_v2)))

    def uri(self) -> str:
        """The link in canonical form; `parse_magnet` of it gives the same without repairs."""
        fields = [("xt", exact_topic(info_hash)) for info_hash in self.info_hashes]
        if self.name:
            fields.append(("dn", quote(self.name, safe="")))
        fields += [("tr", quote(tracker, safe="")) for tracker in self.trackers]
        fields += [("ws", quote(web_seed, safe="")) for web_seed in self.web_seeds]
        fields += [("x.pe", quote(peer, safe=":[]")) for peer in self.peers]
        return "magnet:?" + "&".join(f"{key}={value}" for key, value in fields)


def exact_topic(info_hash: str) -> str:
    """``urn:btih:...`` or ``urn:btmh:1220...``, by the length of the hash."""
    is_v1 = len(info_hash) == 40
    return f"urn:btih:{info_hash}" if is_v1 else f"urn:btmh:1220{info_hash}"


def parse_magnet(text: str) -> Magnet:
    """Reads a link, repairing what social networks, HTML and shells do to it.

    Known damage: quotes and line breaks around or inside, ``&amp;``, a missing ``magnet:?``, and
    ``%2F`` turned into ``%http://2F`` by a link rewriter (the Mixtral link of 2023-12-08).

    Raises:
        MagnetError: there is no usable info-hash in it.
    """
    if len(text) > MAX_LINK_CHARS:
        raise MagnetError(
            f"a magnet link of {len(text)} characters, more than {MAX_LINK_CHARS}: paste one link"
        )
    repairs: list[str] = []
    link = _repair(text, repairs)
    fields = tuple(_fields(link))
    info_hash, info_hash_v2 = _info_hashes([value for key, value in fields if key == "xt"], text)
    name = ""
    trackers: dict[str, None] = {}
    web_seeds: dict[str, None] = {}
    peers: dict[str, None] = {}
    for key, value in fields:
        if key == "dn":
            name = name or "".join(c for c in unquote_plus(value) if c.isprintable()).strip()
        elif key == "tr":
            _keep_url(value, "tracker", TRACKER_SCHEMES, trackers, repairs)
        elif key == "ws":
            _keep_url(value, "web seed", WEB_SEED_SCHEMES, web_seeds, repairs)
        elif key == "x.pe":
            _keep_peer(unquote(value), peers, repairs)
        elif key == "so":
            repairs.append(f"ignored the file selection so={value[:40]}")
    for what, kept, limit in (("trackers", trackers, MAX_TRACKERS), ("peers", peers, MAX_PEERS)):
        if len(kept) > limit:
            repairs.append(f"dropped {len(kept) - limit} {what}, more than {limit} were named")
    return Magnet(
        info_hash=info_hash,
        info_hash_v2=info_hash_v2,
        name=name,
        trackers=tuple(trackers)[:MAX_TRACKERS],
        web_seeds=tuple(web_seeds)[:MAX_TRACKERS],
        peers=tuple(peers)[:MAX_PEERS],
        repairs=tuple(dict.fromkeys(repairs)),
    )


def split_peer(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT`` as host and port; does not look the host up.

    Raises:
        UsageError: it is neither.
    """
    host, colon, port = text.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not colon or not digits or not 1 <= int(port) <= 65_535:
        raise UsageError(f"{text!r} is no peer address: write HOST:PORT, for example 10.0.0.7:6881")
    if not _is_address(bare, bracketed=bare != host) and not _HOST_NAME.fullmatch(bare):
        raise UsageError(f"{host!r} in {text!r} is no host name or address: write HOST:PORT")
    return bare, int(port)


def check_tracker(url: str) -> None:
    """Raises UsageError unless it is a URL of a tracker that can be asked."""
    _check_url(url, "tracker", TRACKER_SCHEMES)


def check_web_seed(url: str) -> None:
    """Raises UsageError unless it is a URL of an HTTP server that may hold the files."""
    _check_url(url, "web seed", WEB_SEED_SCHEMES)


def _check_url(url: str, what: str, schemes: tuple[str, ...]) -> None:
    if not allowed_url(url, schemes):
        port = ", with a port for udp" if "udp" in schemes else ""
        raise UsageError(
            f"{_shown(url)!r} is no {what} that can be asked: write {' or '.join(schemes)}"
            f"://HOST/...{port}"
        )


def allowed_url(url: str, schemes: tuple[str, ...]) -> bool:
    """Whether a tracker or web seed is one that we may ask."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme.lower() not in schemes or not parts.hostname or not url.isascii():
        return False
    if any(c.isspace() or not c.isprintable() for c in url):
        return False
    host = parts.hostname
    if not _is_address(host, bracketed=":" in host) and not _HOST_NAME.fullmatch(host):
        return False
    return parts.scheme.lower() != "udp" or port is not None


def _is_address(host: str, *, bracketed: bool) -> bool:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return False
    return (version == 6) == bracketed


def _repair(text: str, repairs: list[str]) -> str:
    link = text.strip().strip(_QUOTES).strip()
    if link != text.strip():
        repairs.append("removed quotes around the link")
    if re.search(r"[\r\n\t]", link):
        link = re.sub(r"\s*[\r\n\t]+\s*", "", link)
        repairs.append("joined a link that was broken over lines")
    link = link.replace(" ", "%20")
    if re.search(r"\\[?&=]", link):
        link = re.sub(r"\\([?&=])", r"\1", link)
        repairs.append("removed backslashes of a shell")
    if re.search(r"&amp;", link, re.IGNORECASE):
        link = re.sub(r"&(?:amp;)+", "&", link, flags=re.IGNORECASE)
        repairs.append("replaced the HTML &amp; by &")
    if re.search(r"%https?://2F", link, re.IGNORECASE):
        link = re.sub(r"%https?://2F", "%2F", link, flags=re.IGNORECASE)
        repairs.append("replaced %http://2F by %2F (damage of a link rewriter)")
    if re.match(r"magnet%3A", link, re.IGNORECASE):
        link = unquote(link)
        repairs.append("decoded a link that was percent-encoded as a whole")
    return _with_prefix(link, repairs)


def _with_prefix(link: str, repairs: list[str]) -> str:
    if link[:8].lower() == "magnet:?":
        return link[8:]
    query = re.sub(r"\A(?:magnet:)?/*\??", "", link, flags=re.IGNORECASE)
    if re.fullmatch(r"[0-9a-f]{40}|[a-z2-7]{32}", query, re.IGNORECASE):
        repairs.append("took a bare info-hash for a magnet link")
        return f"xt=urn:btih:{query}"
    if re.match(r"urn:bt[im]h:", query, re.IGNORECASE):
        query = f"xt={query}"
    if re.match(r"xt(\.\d+)?=|(dn|tr|ws|x\.pe)=.*&xt(\.\d+)?=", query, re.IGNORECASE):
        repairs.append("added the missing magnet:?")
        return query
    raise MagnetError(
        f"{link[:60]!r} is no magnet link: it should look like magnet:?xt=urn:btih:HASH&dn=NAME"
    )


def _fields(query: str) -> Iterator[tuple[str, str]]:
    for field in query.split("&"):
        key, _, value = field.partition("=")
        # Several of a kind may be numbered: tr.1=..&tr.2=..
        yield re.sub(r"\.\d+\Z", "", key.lower()), value


def _info_hashes(topics: list[str], text: str) -> tuple[str, str]:
    """The hash to go by, and the second one of a hybrid torrent or an empty string."""
    hashes: dict[str, str] = {}
    for topic in map(unquote, topics):
        kind, _, digest = topic.lower().rpartition(":")
        if kind == "urn:btih" and re.fullmatch(r"[0-9a-f]{40}", digest):
            found = digest
        elif kind == "urn:btih" and re.fullmatch(r"[a-z2-7]{32}", digest):
            found = binascii.hexlify(base64.b32decode(digest.upper())).decode()
        elif kind == "urn:btmh" and re.fullmatch(r"1220[0-9a-f]{64}", digest):
            found = digest[4:]
        elif kind in ("urn:btih", "urn:btmh"):
            raise MagnetError(
                f"the info-hash {digest[:80]!r} is damaged: it has 40 hex or 32 base32 digits "
                "after btih, or 1220 and 64 hex digits after btmh; copy the link again"
            )
        else:
            continue
        if hashes.setdefault(kind, found) != found:
            raise MagnetError(
                f"the link names two torrents, {hashes[kind]} and {found}: paste one link only"
            )
    if not hashes:
        raise MagnetError(f"{text.strip()[:60]!r} has no xt=urn:btih:HASH: copy the whole link")
    v1, v2 = hashes.get("urn:btih", ""), hashes.get("urn:btmh", "")
    return (v1, v2) if v1 else (v2, "")


def _keep_url(
    value: str, what: str, schemes: tuple[str, ...], kept: dict[str, None], repairs: list[str]
) -> None:
    url = unquote(value)
    if re.match(r"[a-z]+%3A", url, re.IGNORECASE):
        url = unquote(url)
        repairs.append(f"decoded a {what} that was percent-encoded twice")
    if allowed_url(url, schemes):
        kept[url] = None
        return
    scheme = url.partition(":")[0].lower()
    reason = "it is damaged" if scheme in schemes else f"only {', '.join(schemes)} are allowed"
    repairs.append(f"dropped the {what} {_shown(url)}: {reason}")


def _keep_peer(peer: str, kept: dict[str, None], repairs: list[str]) -> None:
    try:
        host, port = split_peer(peer)
    except UsageError:
        repairs.append(f"dropped the peer {_shown(peer)}: it is no HOST:PORT")
        return
    if port < 1024:
        # A link is written by a stranger and must not make us talk to system services.
        repairs.append(f"dropped the peer {_shown(peer)}: system ports are not asked")
        return
    kept[f"[{host}]:{port}" if ":" in host else f"{host}:{port}"] = None


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:100])
