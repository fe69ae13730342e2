"""An inventory file: machines and links to plan with, measured or wished for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..cluster.inventory.profiles import profiles
from ..cluster.machines import ComputeDtype, DeviceKind, Inventory, Link, Node
from ..cluster.machines import Device as PlanDevice
from ..cluster.planning.soundness import MOST_BYTES, MOST_GBPS, MOST_GFLOPS
from ..errors import NotFoundError
from .facts import Complaint, Part, complaints
from .load import read_manifest
from .suggest import did_you_mean

Rate = Annotated[float, Field(gt=0, le=MOST_GBPS, allow_inf_nan=False)]
"""Of gigabytes per second."""
Work = Annotated[float, Field(gt=0, le=MOST_GFLOPS, allow_inf_nan=False)]
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
        default=None, ge=1, le=MOST_BYTES, description="Free memory to plan with."
    )
    memory_gigabytes: Annotated[float, Field(gt=0, le=MOST_BYTES / 1e9)] | None = Field(
        default=None, description="The same in units of 1e9 bytes."
    )
    read_gigabytes_per_second: Rate | None = Field(
        default=None, description="How fast decoding reads weights."
    )
    read_by_dtype: dict[ComputeDtype, Rate] = Field(
        default_factory=dict, description="The same for single number formats."
    )
    gemm_gflops: Work | None = Field(
        default=None, description="Billions of operations per second in large products."
    )
    gemm_by_dtype: dict[ComputeDtype, Work] = Field(
        default_factory=dict, description="The same for single number formats."
    )
    kv_read_gigabytes_per_second: Rate | None = Field(
        default=None, description="How fast decoding reads keys and values."
    )
    attention_gflops: Work | None = Field(
        default=None,
        description="Billions of operations per second of attention in prompts, heads of 128.",
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

    @property
    def is_cpu(self) -> bool:
        """Whether it is the processor of its node."""
        if self.kind is None and self.profile is not None:
            return profiles()[self.profile].device.kind == "cpu"
        return self.kind == "cpu"

    def to_device(self, index: int) -> PlanDevice:
        """The same for the planner."""
        memory, kind = self.memory_bytes, self.kind
        reads, computes = self.read_gigabytes_per_second, self.gemm_gflops
        reads_kv, attends = self.kv_read_gigabytes_per_second, self.attention_gflops
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
            # A speed of its own is not that of the profile's attention.
            if self.read_gigabytes_per_second is None:
                reads_kv = reads_kv or base.kv_read_gbps
            if self.gemm_gflops is None:
                attends = attends or base.attention_gflops
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
            assumed=profiles()[self.profile].device.assumed if self.profile is not None else "",
            read_gbps=reads,
            dtype_read_gbps=tuple(self.read_by_dtype.items()),
            gemm_gflops=computes,
            dtype_gemm_gflops=tuple(self.gemm_by_dtype.items()),
            kv_read_gbps=reads_kv,
            attention_gflops=attends,
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

    @model_validator(mode="after")
    def _one_cpu(self) -> "NodeEntry":
        cpus = [number for number, each in enumerate(self.devices) if each.is_cpu]
        if len(cpus) > 1:
            said = "there is a cpu already; join them, for a node has one, with all its memory"
            raise complaints([(("devices", number), said) for number in cpus[1:]])
        return self

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


def _check_passes(rate: float) -> float:
    if rate <= 0:
        raise PydanticCustomError(
            "value",
            "nothing gets through at {rate}: say how fast the way there is, be it a detour, or "
            "leave out one of the two nodes",
            {"rate": f"{rate:g}"},
        )
    return rate


class Wire(Part):
    """What lies between two machines."""

    rtt_milliseconds: float = Field(
        ge=0, le=60_000, allow_inf_nan=False, description="There and back."
    )
    gigabytes_per_second: Annotated[
        float, Field(le=MOST_GBPS, allow_inf_nan=False), AfterValidator(_check_passes)
    ] = Field(description="10 Gbit/s are 1.25.")
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
        found = [*self._namesakes(), *self._loose_ends(), *self._doubled_wires()]
        if found:
            raise complaints(found)
        return self

    def _namesakes(self) -> Iterator[Complaint]:
        known: set[str] = set()
        for number, node in enumerate(self.nodes):
            if twice := sorted(known & set(node.hosts)):
                told = ", ".join(twice[:8])
                yield (
                    ("nodes", number, "host"),
                    f"{told} is a node already; give each a name of its own",
                )
            known |= set(node.hosts)

    def _loose_ends(self) -> Iterator[Complaint]:
        hosts = [host for node in self.nodes for host in node.hosts]
        for number, link in enumerate(self.links):
            for end, host in (("source", link.source), ("target", link.target)):
                if host not in hosts:
                    hint = did_you_mean(host, hosts) or f"; nodes: {', '.join(hosts[:8])}"
                    yield ("links", number, end), f"{host!r} is no node{hint}"

    def _doubled_wires(self) -> Iterator[Complaint]:
        known: set[tuple[str, str]] = set()
        for number, link in enumerate(self.links):
            if (link.source, link.target) in known:
                yield (
                    ("links", number, "source"),
                    f"{link.source} to {link.target} is there already; keep one of the two",
                )
            known.add((link.source, link.target))

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
