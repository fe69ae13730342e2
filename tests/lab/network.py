"""Machines that are not there: network namespaces with shaped links, or addresses of loopback.

Every host has a card in the local network and, if it has a way out, one in the network outside;
each network is a bridge. Rates are shaped with tbf where a link enters and leaves a host, so that
they hold in each direction by themselves. All of it lies in namespaces and ends with them.

Where namespaces are not allowed the hosts are addresses of 127/8: the same programs run, with
no rates (seeders have limits of their own) and nothing counted but what the programs say.
"""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

MODE_VARIABLE = "MAGNETAR_LAB"
"""``namespaces`` or ``loopback`` forces one; otherwise namespaces are used where they can be."""
_PREFIX = "mglab"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a program of the lab runs."""

    name: str
    lan: str
    """Address in the local network; empty outside."""
    wan: str | None
    """Address outside; None without a way out."""
    prefix: tuple[str, ...] = ()
    """What stands before a command to run it here."""
    rate_bytes_per_s: int = 0
    """What programs must keep to by themselves on the way out, where no link does; 0: nothing."""

    def outside_bytes(self) -> int:
        """What the card to the outside has taken in, by the kernel's count, headers and all."""
        shown = subprocess.run(
            [*self.prefix, "ip", "-s", "-j", "link", "show", "dev", "wan"],
            capture_output=True,
            check=True,
        )
        return int(json.loads(shown.stdout)[0]["stats64"]["rx"]["bytes"])


class Network(Protocol):
    """Hosts on demand."""

    counts: bool
    """Whether `Place.outside_bytes` works, and rates hold by themselves."""

    def host(
        self,
        name: str,
        *,
        down_bytes_per_s: int = 0,
        up_bytes_per_s: int = 0,
        has_way_out: bool = True,
        is_outside: bool = False,
    ) -> Place:
        """A new host, of the local network unless `is_outside`.

        The rates are those of its card to the outside, 0 for no limit.
        """
        ...


class Loopback:
    """Hosts as addresses of this machine."""

    counts = False

    def __init__(self) -> None:
        self._num_hosts = 0

    def host(
        self,
        name: str,
        *,
        down_bytes_per_s: int = 0,
        up_bytes_per_s: int = 0,
        has_way_out: bool = True,
        is_outside: bool = False,
    ) -> Place:
        self._num_hosts += 1
        address = f"127.77.0.{self._num_hosts}"
        return Place(
            name=name,
            lan=address,
            wan=address if has_way_out else None,
            rate_bytes_per_s=up_bytes_per_s,
        )


class Namespaces:
    """Hosts as network namespaces; a context manager."""

    counts = True

    def __init__(self) -> None:
        self._tag = f"{_PREFIX}-{os.getpid()}"
        self._switch = f"{self._tag}-switch"
        self._places: list[Place] = []

    def __enter__(self) -> "Namespaces":
        _remove_stale()
        _ip(f"netns add {self._switch}")
        _ip("link add lan type bridge", "link add wan type bridge", namespace=self._switch)
        _ip("link set lan up", "link set wan up", namespace=self._switch)
        return self

    def __exit__(self, *raised: object) -> None:
        for name in (*(place.prefix[1].rpartition("/")[2] for place in self._places), self._switch):
            _ip(f"netns delete {name}")

    def host(
        self,
        name: str,
        *,
        down_bytes_per_s: int = 0,
        up_bytes_per_s: int = 0,
        has_way_out: bool = True,
        is_outside: bool = False,
    ) -> Place:
        number = len(self._places) + 1
        own = f"{self._tag}-{name}"
        place = Place(
            name=name,
            lan="" if is_outside else f"10.77.{number >> 8}.{number & 255}",
            # libtorrent and we treat private addresses as near; these are outside.
            wan=f"11.77.{number >> 8}.{number & 255}" if has_way_out else None,
            prefix=("nsenter", f"--net=/run/netns/{own}"),
        )
        _ip(f"netns add {own}")
        self._places.append(place)
        _ip("link set lo up", namespace=own)
        for network, address in (("lan", place.lan), ("wan", place.wan)):
            if not address:
                continue
            port = f"{network}{number}"
            _ip(
                f"link add {port} type veth peer name {network} netns {own}", namespace=self._switch
            )
            _ip(f"link set {port} master {network} up", namespace=self._switch)
            _ip(
                f"address add {address}/16 dev {network}",
                f"link set {network} up",
                namespace=own,
            )
        if place.wan is not None:
            _ip("route add default dev wan", namespace=own)
            _shape(own, "wan", up_bytes_per_s)
            _shape(self._switch, f"wan{number}", down_bytes_per_s)
        return place


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """The best network that this process may have."""
    mode = os.environ.get(MODE_VARIABLE) or ("namespaces" if can_have_namespaces() else "loopback")
    if mode == "loopback":
        yield Loopback()
    else:
        with Namespaces() as namespaces:
            yield namespaces


def can_have_namespaces() -> bool:
    """Whether this process may make network namespaces with bridges and shaped links."""
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _ip(f"netns add {probe}")
    except (OSError, subprocess.CalledProcessError):
        return False
    try:
        _ip("link add probe type bridge", "link add one type veth peer name two", namespace=probe)
        _shape(probe, "one", 1 << 20)
    except subprocess.CalledProcessError:
        return False
    finally:
        _ip(f"netns delete {probe}")
    return True


def _shape(namespace: str, device: str, rate_bytes_per_s: int) -> None:
    if rate_bytes_per_s:
        # A burst of at least one whole offloaded segment, or tbf has to cut each of them up.
        burst = max(1 << 16, rate_bytes_per_s // 50)
        command = f"tc -n {namespace} qdisc add dev {device} root tbf "
        command += f"rate {rate_bytes_per_s * 8}bit burst {burst} latency 50ms"
        subprocess.run(command.split(), check=True, capture_output=True)


def _ip(*commands: str, namespace: str | None = None) -> None:
    within = [] if namespace is None else ["-n", namespace]
    subprocess.run(
        ["ip", *within, "-batch", "-"],
        input="\n".join(commands),
        text=True,
        check=True,
        capture_output=True,
    )


def _remove_stale() -> None:
    """Namespaces of a lab that was killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        found = re.match(rf"{_PREFIX}-([0-9]+)-\S+", line)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            _ip(f"netns delete {found[0]}")
