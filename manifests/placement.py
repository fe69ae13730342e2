"""The part of a manifest that says where a deployment runs."""

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated

from pydantic import Field, model_validator

from ..cluster.plan import NodeWish, Objective
from ..cluster.planning.expert_pins import ExpertPin
from ..fetcher.only import parse_only
from .facts import Complaint, Part, checked, complaints


def layer_range(text: str) -> tuple[int, int]:
    """[first, end) of ``FIRST-LAST`` or of one number.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if match is None:
        raise ValueError(f"{text!r} is no range of layers: write 0-7, or 3 for one layer")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"{text!r} ends before it begins: write {last}-{first}")
    return first, last + 1


class ExpertsOnNode(Part):
    """Experts for one node, whoever has their layers."""

    node: str = Field(min_length=1, description="Label of the node, as `magnetar nodes` shows it.")
    hold: Annotated[str, checked(parse_only)] = Field(
        description="LAYERS or LAYERS/EXPERTS, for example 0-31/4-7.",
    )
    is_copy: bool = Field(
        default=False,
        alias="copy",
        description="Who holds them otherwise keeps them, and shares the work.",
    )

    def to_pin(self) -> ExpertPin:
        """The same for the controller."""
        hold = parse_only(self.hold)
        experts = None if hold.experts is None else tuple(sorted(hold.experts))
        return ExpertPin(
            host=self.node,
            layers=tuple(sorted(hold.layers)),
            experts=experts,
            is_copy=self.is_copy,
        )


class NodeUse(Part):
    """What one node may be used for."""

    node: str = Field(min_length=1, description="Label of the node, as `magnetar nodes` shows it.")
    exclude: bool = Field(default=False, description="It gets nothing.")
    memory_gigabytes: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = Field(
        default=None, description="At most so much of each of its devices, in units of 1e9 bytes."
    )
    layers: Annotated[str, checked(layer_range)] | None = Field(
        default=None, description="It holds these layers and no others, for example 0-7."
    )

    def to_wish(self) -> NodeWish:
        """The same for the planner."""
        memory = None if self.memory_gigabytes is None else int(self.memory_gigabytes * 1e9)
        layers = None if self.layers is None else layer_range(self.layers)
        return NodeWish(host=self.node, exclude=self.exclude, memory_bytes=memory, layers=layers)


class Placement(Part):
    """Where it runs."""

    stages: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Parts that the layers are split into; by default what is best, or as few as "
        "fit where speeds are unknown.",
    )
    pipelines: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Times that the whole model is held, each on devices of its own, for a share "
        "of the requests; one, or as many as are best for `throughput`.",
    )
    objective: Objective = Field(
        default="latency",
        description="What to be best at where the speeds of all nodes are known: `latency` for "
        "one stream, `throughput` for all together, `fit` for few nodes.",
    )
    experts: list[ExpertsOnNode] = Field(
        default_factory=list,
        description="Experts for certain nodes: each computes those of layers that others have.",
    )
    nodes: list[NodeUse] = Field(
        default_factory=list, description="What single nodes may be used for; others for all."
    )
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="An existing Ray cluster; one is started by default.",
    )
    store: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for releases on every node, `{host}` for the node's label; relative "
        "to the manifest.",
    )
    wan_mbps: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="Mbit/s that nodes get from outside, by host label, so that the faster ones "
        "bring more, also for others; 0: that node has no way out, and others bring what it needs.",
    )

    @model_validator(mode="after")
    def _without_contradictions(self) -> "Placement":
        found = [*self._wishes_at_odds(), *self._shared_layers(), *self._experts_for_nobody()]
        if found:
            raise complaints(found)
        return self

    def _wishes_at_odds(self) -> Iterator[Complaint]:
        for number, use in enumerate(self.nodes):
            if use.node in [other.node for other in self.nodes[:number]]:
                yield ("nodes", number, "node"), f"{use.node} is there already; join the entries"
            for name, wish in (("layers", use.layers), ("memoryGigabytes", use.memory_gigabytes)):
                if use.exclude and wish is not None:
                    said = f"{use.node} is excluded, and may have no {name}; keep one of them"
                    yield ("nodes", number, name), said

    def _shared_layers(self) -> Iterator[Complaint]:
        pins = [(n, *layer_range(use.layers)) for n, use in enumerate(self.nodes) if use.layers]
        for (one, first, end), (other, start, stop) in combinations(pins, 2):
            if start < end and first < stop:
                yield (
                    ("nodes", other, "layers"),
                    f"{self.nodes[one].node} has layer {max(first, start)} already; a layer has "
                    "one node",
                )

    def _experts_for_nobody(self) -> Iterator[Complaint]:
        excluded = {use.node for use in self.nodes if use.exclude}
        for number, experts in enumerate(self.experts):
            if experts.node in excluded:
                said = f"{experts.node} is excluded, and can hold no experts; keep one of them"
                yield ("experts", number, "node"), said
