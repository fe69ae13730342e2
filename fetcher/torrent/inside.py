"""Addresses of this machine and its own network, which a stranger's link has no business to name.

A magnet link or a .torrent says which URLs we call up. Whoever wrote it sits outside, and could
make us knock at a router, a cloud's metadata service or a neighbour's admin page (request forgery).
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

_INSIDE = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "::/127",
            "fc00::/7",
            "fe80::/10",
        ),
    )
)
_INSIDE_NAMES = re.compile(r"(?:.*\.)?(?:localhost|local|internal|intranet|lan|home|home\.arpa)")
_NUMERIC = re.compile(r"[0-9a-fx.]+", re.IGNORECASE)


def is_inside(url: str) -> bool:
    """Whether a URL names this machine or a private network, going by its text.

    A public name that resolves to a private address does not show here; libtorrent's
    ``ssrf_mitigation`` is for those.
    """
    host = (urlsplit(url).hostname or "").rstrip(".").partition("%")[0]
    if (address := _address(host)) is not None:
        return any(address in network for network in _INSIDE)
    return "." not in host or _INSIDE_NAMES.fullmatch(host) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a resolver takes this text for; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return mapped or address
    if not _NUMERIC.fullmatch(host):
        return None
    try:
        # 2130706433, 0x7f.1 and 127.1 are addresses to a resolver too.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
