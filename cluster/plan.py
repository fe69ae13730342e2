"""The data of planning: what is asked of machines, and the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from ..errors import InfeasiblePlanError
from .machines import ComputeDtype

Objective = Literal["latency", "throughput", "fit"]
"""What a plan optimises where speeds are known; ``fit`` looks at memory alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeWish:
    """What one node may be used for."""

    host: str
    exclude: bool = False
    """It gets nothing."""
    memory_bytes: int | None = None
    """At most so much of each of its devices is planned with; None: all that is free."""
    layers: tuple[int, int] | None = None
    """[first, end): it holds these layers, and no others; None: any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What the deployment must be able to do."""

    max_context_tokens: int
    max_concurrency: int = 8
    """Sequences of full context whose keys and values must fit."""
    dtype: ComputeDtype | None = None
    """None: what the checkpoint holds."""
    num_stages: int | None = None
    """Of each pipeline; None: what is best, or as few as fit where speeds are unknown."""
    num_pipelines: int | None = None
    """None: as many as are best for ``throughput``, else one."""
    min_context_tokens: int | None = None
    """Where memory is short the context may shrink down to this, with a note; None: never."""
    objective: Objective = "latency"
    separate_experts: bool = False
    """Whether experts of a stage may be on other devices than its attention."""
    nodes: tuple[NodeWish, ...] = ()
    """Wishes for single nodes; of other nodes everything may be used."""
    popularity: tuple[tuple[float, ...], ...] | None = None
    """Of each layer, how often a token needs each expert; None: all experts are alike."""


ExpertIds: TypeAlias = tuple[tuple[int, ...], ...]
"""Per layer of a stage, from its first one on: ascending expert ids, () for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertHost:
    """A device that computes experts of a stage whose attention and router are elsewhere.

    It has no keys and values, and holds its experts in the dtype of the stage. Rows travel to it
    from the stage's own device once a layer, and the output of every expert comes back; the stage
    weighs and sums them.
    """

    host: str
    device: str
    """``cpu`` or ``cuda:0``; never the stage's own device."""
    num_threads: int
    weights_bytes: int
    free_bytes: int
    """Memory of the device left after everything that the plan puts there."""
    experts: ExpertIds
    workspace_bytes: int = 0
    """What it needs beside weights: its process and buffers."""
    step_s: float | None = None
    """Predicted time of its experts in one decode step, all layers; None: no speed is known."""
    hop_s: float | None = None
    """Predicted time for the rows of one layer to get there and back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Consecutive layers: attention on one device, experts there and on the stage's helpers."""

    index: int
    """Within its pipeline, from 0."""
    host: str
    device: str
    """``cpu`` or ``cuda:0``."""
    first_layer: int
    end_layer: int
    """One past the last layer (global ids)."""
    has_embeddings: bool
    has_output: bool
    dtype: ComputeDtype
    num_threads: int
    weights_bytes: int
    kv_bytes: int
    free_bytes: int
    """Memory of the device left after the weights, keys and values and workspace of all stages on
    it; a tenth of the device, or more, always is."""
    workspace_bytes: int = 0
    """What the stage needs whatever its layers: its process, buffers, one gathered sequence."""
    step_s: float | None = None
    """Predicted time of one decode step; None where no speed is known."""
    hop_s: float | None = None
    """Predicted time to hand a step on: to the next stage, from the last to the first."""
    experts: ExpertIds | None = None
    """Those on the stage's own device; None: all of every layer."""
    helpers: tuple[ExpertHost, ...] = ()
    """Other devices with experts of these layers. An expert that two devices hold is a replica."""

    @property
    def seat(self) -> tuple[str, str]:
        """Host and device."""
        return self.host, self.device

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Who has one expert of a global layer: -1 the stage's own device, else its helpers."""
        row = layer - self.first_layer
        own = (-1,) if self.experts is None or expert in self.experts[row] else ()
        there = (n for n, helper in enumerate(self.helpers) if expert in helper.experts[row])
        return (*own, *there)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a pipeline, or several together, should achieve under the cost model (`cost.py`)."""

    objective: Objective
    step_tokens: int
    """Sequences in one decode step; of several pipelines in one of each."""
    round_trip_s: float
    """One decode step through all stages and links and back; of several pipelines the longest."""
    tokens_per_s: float
    """All streams together: the least of the bottleneck's rate and streams per round trip."""
    stream_tokens_per_s: float
    """One stream, alone; of several pipelines on the slowest."""
    prefill_s: float
    """A prompt of `prefill_tokens` tokens, alone, to its first token; as slow as any pipeline."""
    prefill_tokens: int
    assumed: tuple[str, ...] = ()
    """What was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The whole model once: consecutive stages, and what decodes through them."""

    stages: tuple[StagePlan, ...]
    num_kv_blocks: int
    """KV blocks of every stage; block ids count within the pipeline."""
    max_concurrency: int
    """Sequences of full context whose keys and values fit."""
    prediction: Prediction | None = None
    """None where no speed is known."""
    num_micro_batches: int | None = None
    """Steps that decoding is cut into at a time; None: `steps_at_once` decides."""
    max_step_tokens: int | None = None
    """Tokens of a step at most, chunks of prompts with them; None: the engine's own limit."""

    @property
    def steps_at_once(self) -> int:
        """Steps that decoding is cut into at a time: of stages on one device only one computes."""
        return self.num_micro_batches or len({(each.host, each.device) for each in self.stages})

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every node with a stage, then those with helpers alone."""
        return _hosts(self.stages)

    @property
    def bottleneck(self) -> int | None:
        """Index of the stage that takes longest; None where no speed is known."""
        if any(stage.step_s is None for stage in self.stages):
            return None
        return max(range(len(self.stages)), key=lambda number: self.stages[number].step_s or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusedNode:
    """A node without a part in the plan, or a device of one with a part, and why."""

    host: str
    reason: str
    device: str | None = None
    """Of a node with other devices in use; None: the node as a whole is not used."""

    @property
    def name(self) -> str:
        """For people."""
        return self.host if self.device is None else f"{self.host} {self.device}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Concession:
    """Something that was asked for, or comes with the model, and does not fit."""

    knob: Literal["dtype", "context"]
    freed_bytes: int
    """Memory that giving it up freed, on all devices together."""
    text: str
    """For people: what was given up, what it freed, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One or more placements of the whole model, which share nothing but the disks of nodes."""

    pipelines: tuple[Pipeline, ...]
    """At least one; no device has parts of two."""
    max_context_tokens: int
    unused: tuple[UnusedNode, ...] = ()
    concessions: tuple[Concession, ...] = ()
    best_possible: float | None = None
    """What no plan of these weights on these nodes goes beyond under this model: tokens per second
    of all streams for throughput, else the seconds of a round trip; the plan's own where it was
    found among all. None: nobody can say."""

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """Of all pipelines, one after the other; an index counts within its pipeline."""
        return tuple(stage for pipeline in self.pipelines for stage in pipeline.stages)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every node with a stage, then those with helpers alone."""
        return _hosts(self.stages)

    @property
    def max_concurrency(self) -> int:
        """Sequences of full context whose keys and values fit, on all pipelines together."""
        return sum(pipeline.max_concurrency for pipeline in self.pipelines)

    @property
    def num_kv_blocks(self) -> int:
        """Of all pipelines together."""
        return sum(pipeline.num_kv_blocks for pipeline in self.pipelines)

    @property
    def prediction(self) -> Prediction | None:
        """What all pipelines do together; None where no speed is known."""
        told = [each.prediction for each in self.pipelines if each.prediction is not None]
        if len(told) < len(self.pipelines):
            return None
        return Prediction(
            objective=told[0].objective,
            step_tokens=sum(each.step_tokens for each in told),
            round_trip_s=max(each.round_trip_s for each in told),
            tokens_per_s=sum(each.tokens_per_s for each in told),
            stream_tokens_per_s=min(each.stream_tokens_per_s for each in told),
            prefill_s=max(each.prefill_s for each in told),
            prefill_tokens=told[0].prefill_tokens,
            assumed=tuple(dict.fromkeys(said for each in told for said in each.assumed)),
        )

    @property
    def gap(self) -> float | None:
        """By which share the best plan that there may be is better than this one, at most."""
        told = self.prediction
        if self.best_possible is None or told is None:
            return None
        if told.objective == "throughput":
            return max(0.0, self.best_possible / told.tokens_per_s - 1)
        return max(0.0, told.round_trip_s / self.best_possible - 1)


def _hosts(stages: Sequence[StagePlan]) -> tuple[str, ...]:
    helpers = (helper.host for stage in stages for helper in stage.helpers)
    return tuple(dict.fromkeys((*(stage.host for stage in stages), *helpers)))


def check_experts(plan: Plan, num_experts: int) -> None:
    """Hold the experts of a plan to their contract, wherever it came from.

    Raises:
        InfeasiblePlanError: a stage without a device for one of its experts, or an expert that
            the model does not have, is named twice or out of order, or with a layer too many.
    """
    several = len(plan.pipelines) > 1
    named = [
        (f"pipeline {number}, stage {stage.index}" if several else f"stage {stage.index}", stage)
        for number, pipeline in enumerate(plan.pipelines)
        for stage in pipeline.stages
    ]
    for name, stage in named:
        layers = range(stage.first_layer, stage.end_layer)
        own = ((stage.host, stage.device, stage.experts),) if stage.experts is not None else ()
        shares = (*own, *((h.host, h.device, h.experts) for h in stage.helpers))
        places = [(stage.host, stage.device), *((h.host, h.device) for h in stage.helpers)]
        if len(set(places)) < len(places):
            raise InfeasiblePlanError(
                f"{name} names a device twice among itself and its helpers: "
                f"{', '.join(' '.join(place) for place in places)}; name each once"
            )
        for host, device, experts in shares:
            where = f"{name}, {host} {device}"
            if len(experts) != len(layers):
                raise InfeasiblePlanError(
                    f"{where}: experts of {len(experts)} layers, the stage has {len(layers)}; "
                    "name them for each layer"
                )
            for layer, row in zip(layers, experts, strict=True):
                ascending = all(a < b for a, b in pairwise(row))
                if not ascending or not all(0 <= expert < num_experts for expert in row):
                    raise InfeasiblePlanError(
                        f"{where}: experts {row} of layer {layer}; they must be ascending "
                        f"and each less than {num_experts}"
                    )
        for layer in layers:
            for expert in range(num_experts):
                if not stage.holders(layer, expert):
                    raise InfeasiblePlanError(
                        f"{name}: nobody holds expert {expert} of layer {layer}; "
                        "give it to the stage's device or to a helper"
                    )
