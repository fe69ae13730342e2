"""Where peers are, and from which addresses of ours they are reached."""

import ipaddress
import socket
from collections.abc import Iterable

Address = tuple[str, int]
"""IP address and port."""


def is_local(address: str) -> bool:
    """Whether an IP address is on this machine or in a private network."""
    ip = ipaddress.ip_address(address)
    return ip.is_loopback or ip.is_private or ip.is_link_local


def own_interfaces(peers: Iterable[Address], *, reaches_out: bool) -> str:
    """Where to listen: only on the addresses from which these peers, or the world, are reached."""
    found = [
        f"[{address}]:0" if ":" in address else f"{address}:0"
        for address in routes(peers, reaches_out=reaches_out)
    ]
    return ",".join(found) or "127.0.0.1:0"


def routes(peers: Iterable[Address], *, reaches_out: bool) -> list[str]:
    """Our addresses from which these peers, or the world, are reached; empty without a route.

    Only the routing table is asked: a firewall on the way does not show.
    """
    targets = [host for host, _ in peers]
    if reaches_out or not targets:
        # Addresses of documentation networks: nothing is sent.
        targets += ["192.0.2.1", "2001:db8::1"]
    found: dict[str, None] = {}
    for target in targets:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                found[str(probe.getsockname()[0])] = None
        except OSError:
            continue  # No route there: nothing could reach us by it either.
    return list(found)
