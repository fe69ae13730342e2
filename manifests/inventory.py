"""An inventory file: machines and links to plan with, measured or wished for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..cluster.inventory.profiles import profiles
from ..cluster.plan import ComputeDtype, DeviceKind, Inventory, Link, Node
from ..cluster.plan import Device as PlanDevice
from ..errors import NotFoundError
from .facts import Part
from .load import read_manifest
from .suggest import did_you_mean

Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Overhead = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


def _check_profile(name: str) -> str:
    if name not in profiles():
        known = ", ".join(sorted(profiles()))
        hint = did_you_mean(name, profiles()) or f"; known: {known}"
        raise PydanticCustomError(
            "value", "there is no profile {name}{hint}", {"name": repr(name), "hint": hint}
        )
    return name


class DeviceEntry(Part):
    """A processor or an accelerator; what it does not say comes from its profile."""

    kind: DeviceKind | None = Field(default=None, description="`cpu` or `cuda`.")
    profile: Annotated[str, AfterValidator(_check_profile)] | None = Field(
        default=None, description="A named device, such as a100-40."
    )
    name: str | None = Field(default=None, description="For people.")
    memory_bytes: int | None = Field(
        default=None, ge=1, le=1 << 50, description="Free memory to plan with."
    )
    memory_gigabytes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="The same in units of 1e9 bytes."
    )
    read_gigabytes_per_second: Rate | None = Field(
        default=None, description="How fast decoding reads weights."
    )
    read_by_dtype: dict[ComputeDtype, Rate] = Field(
        default_factory=dict, description="The same for single number formats."
    )
    gemm_gflops: Rate | None = Field(
        default=None, description="Billions of operations per second in large products."
    )
    gemm_by_dtype: dict[ComputeDtype, Rate] = Field(
        default_factory=dict, description="The same for single number formats."
    )
    layer_overhead_microseconds: Overhead | None = Field(
        default=None, description="What a layer takes in every step whatever its size."
    )
    step_overhead_microseconds: Overhead | None = Field(
        default=None, description="What a stage takes in every step beside its layers."
    )
    helper_overhead_microseconds: Overhead | None = Field(
        default=None,
        description="What a layer takes longer with experts elsewhere, beside the way there.",
    )

    @model_validator(mode="after")
    def _known_enough(self) -> "DeviceEntry":
        if self.memory_bytes is not None and self.memory_gigabytes is not None:
            raise PydanticCustomError("value", "has both memoryBytes and memoryGigabytes: keep one")
        if self.profile is None:
            if self.kind is None:
                raise PydanticCustomError("value", "needs a kind or a profile")
            if self.memory_bytes is None and self.memory_gigabytes is None:
                raise PydanticCustomError("value", "needs memoryGigabytes or a profile")
        return self

    def to_device(self, index: int) -> PlanDevice:
        """The same for the planner."""
        memory, kind = self.memory_bytes, self.kind
        reads, computes = self.read_gigabytes_per_second, self.gemm_gflops
        overheads_us = (
            self.layer_overhead_microseconds,
            self.step_overhead_microseconds,
            self.helper_overhead_microseconds,
        )
        known_s = (0.0, 0.0, 0.0)
        if memory is None and self.memory_gigabytes is not None:
            memory = int(self.memory_gigabytes * 1e9)
        if self.profile is not None:
            base = profiles()[self.profile].device
            memory, kind = memory or base.memory_bytes, kind or base.kind
            reads, computes = reads or base.read_gbps, computes or base.gemm_gflops
            known_s = (base.layer_overhead_s, base.step_overhead_s, base.helper_overhead_s)
        layer_s, step_s, helper_s = (
            known if given is None else given / 1e6
            for given, known in zip(overheads_us, known_s, strict=True)
        )
        assert memory is not None
        assert kind is not None
        return PlanDevice(
            kind=kind,
            index=index,
            memory_bytes=memory,
            name=self.name or self.profile or "",
            read_gbps=reads,
            dtype_read_gbps=tuple(self.read_by_dtype.items()),
            gemm_gflops=computes,
            dtype_gemm_gflops=tuple(self.gemm_by_dtype.items()),
            layer_overhead_s=layer_s,
            step_overhead_s=step_s,
            helper_overhead_s=helper_s,
        )


class NodeEntry(Part):
    """One machine, or several that are alike."""

    host: str = Field(min_length=1, max_length=63, description="Its name; unique.")
    count: int = Field(
        default=1, ge=1, le=1024, description="How many; they are then called host-0, host-1, ..."
    )
    cpus: int = Field(default=1, ge=1, le=4096, description="Processors.")
    disk_free_bytes: int = Field(default=0, ge=0, description="For releases.")
    held_bytes: int = Field(default=0, ge=0, description="Of the release, that it has already.")
    busy_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Of its processors, that other work took while it was measured.",
    )
    devices: list[DeviceEntry] = Field(min_length=1, description="What computes.")

    @property
    def hosts(self) -> list[str]:
        """The names of the machines."""
        if self.count == 1:
            return [self.host]
        return [f"{self.host}-{number}" for number in range(self.count)]

    def to_nodes(self) -> list[Node]:
        """The same for the planner."""
        found: list[PlanDevice] = []
        for entry in self.devices:
            device = entry.to_device(0)
            same = sum(each.kind == device.kind for each in found)
            found.append(entry.to_device(same))
        return [
            Node(
                host=host,
                address="",
                num_cpus=self.cpus,
                devices=tuple(found),
                disk_free_bytes=self.disk_free_bytes,
                held_bytes=self.held_bytes,
                busy_share=self.busy_share,
            )
            for host in self.hosts
        ]


class Wire(Part):
    """What lies between two machines."""

    rtt_milliseconds: float = Field(
        ge=0, le=60_000, allow_inf_nan=False, description="There and back."
    )
    gigabytes_per_second: Rate = Field(description="10 Gbit/s are 1.25.")
    overhead_microseconds: Overhead = Field(
        default=100.0,
        description="Software of a message; 0 where the round trip was measured with it.",
    )

    def to_link(self, source: str, target: str) -> Link:
        """The same for the planner."""
        return Link(
            source=source,
            target=target,
            rtt_s=self.rtt_milliseconds / 1000,
            gbps=self.gigabytes_per_second,
            overhead_s=self.overhead_microseconds / 1e6,
        )


class WireEntry(Wire):
    """A wire with its ends; it counts for both directions unless the other one is given too."""

    source: str = Field(description="Host that sends.")
    target: str = Field(description="Host that receives.")


class InventoryFile(Part):
    """A cluster."""

    api_version: Literal["magnetar/v1"] = Field(description="Version of this format.")
    kind: Literal["Inventory"] = Field(description="What the file describes.")
    nodes: list[NodeEntry] = Field(min_length=1, description="The machines.")
    links: list[WireEntry] = Field(default_factory=list, description="Wires that are known.")
    default_link: Wire | None = Field(
        default=None, description="Between all machines that have no other; else 1 GbE is assumed."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "InventoryFile":
        hosts = [host for node in self.nodes for host in node.hosts]
        twice = sorted({host for host in hosts if hosts.count(host) > 1})
        if twice:
            raise PydanticCustomError(
                "value", "two nodes are called {names}", {"names": ", ".join(twice)}
            )
        ends = {end for link in self.links for end in (link.source, link.target)}
        strangers = sorted(ends - set(hosts))
        if strangers:
            raise PydanticCustomError(
                "value",
                "a link names {names}, which is no node; nodes: {hosts}",
                {"names": ", ".join(strangers), "hosts": ", ".join(hosts[:8])},
            )
        return self

    def to_inventory(self) -> Inventory:
        """The same for the planner."""
        nodes = tuple(node for entry in self.nodes for node in entry.to_nodes())
        links = {(w.source, w.target): w.to_link(w.source, w.target) for w in self.links}
        if self.default_link is not None:
            for a in nodes:
                for b in nodes:
                    pair, back = (a.host, b.host), (b.host, a.host)
                    if a is not b and pair not in links and back not in links:
                        links[pair] = self.default_link.to_link(*pair)
        return Inventory(nodes=nodes, links=tuple(links.values()))


def load_inventory(file: Path, *, environment: Mapping[str, str]) -> Inventory:
    """Reads an inventory file.

    Raises:
        NotFoundError: there is no such file.
        ManifestError: everything that is wrong, with ``file:line:column``.
    """
    try:
        found = read_manifest(file, InventoryFile, environment=environment)
    except NotFoundError as error:
        raise NotFoundError(
            f"there is no inventory {file}: `magnetar nodes -o yaml` writes one"
        ) from error
    return found.to_inventory()


def inventory_document(inventory: Inventory) -> dict[str, Any]:
    """An inventory as the value of such a file; `load_inventory` gives it back."""
    return {
        "apiVersion": "magnetar/v1",
        "kind": "Inventory",
        "nodes": [
            {
                "host": node.host,
                "cpus": node.num_cpus,
                "diskFreeBytes": node.disk_free_bytes,
                **({"heldBytes": node.held_bytes} if node.held_bytes else {}),
                **({"busyShare": round(node.busy_share, 2)} if node.busy_share else {}),
                "devices": [_device_value(device) for device in node.devices],
            }
            for node in inventory.nodes
        ],
        **(
            {
                "links": [
                    {
                        "source": link.source,
                        "target": link.target,
                        "rttMilliseconds": round(link.rtt_s * 1000, 4),
                        "gigabytesPerSecond": float(f"{link.gbps:.4g}"),
                        "overheadMicroseconds": round(link.overhead_s * 1e6, 1),
                    }
                    for link in inventory.links
                ]
            }
            if inventory.links
            else {}
        ),
    }


def _device_value(device: PlanDevice) -> dict[str, Any]:
    def rounded(rates: tuple[tuple[ComputeDtype, float], ...]) -> dict[str, float]:
        return {dtype: float(f"{rate:.4g}") for dtype, rate in rates}

    value: dict[str, Any] = {"kind": device.kind}
    if device.name:
        value["name"] = device.name
    value["memoryBytes"] = device.memory_bytes
    if device.read_gbps is not None:
        value["readGigabytesPerSecond"] = float(f"{device.read_gbps:.4g}")
    if device.dtype_read_gbps:
        value["readByDtype"] = rounded(device.dtype_read_gbps)
    if device.gemm_gflops is not None:
        value["gemmGflops"] = float(f"{device.gemm_gflops:.4g}")
    if device.dtype_gemm_gflops:
        value["gemmByDtype"] = rounded(device.dtype_gemm_gflops)
    for name, seconds in (
        ("layerOverheadMicroseconds", device.layer_overhead_s),
        ("stepOverheadMicroseconds", device.step_overhead_s),
        ("helperOverheadMicroseconds", device.helper_overhead_s),
    ):
        if seconds:
            value[name] = float(f"{seconds * 1e6:.4g}")
    return value
