"""What `engine.py` compares: engines, tasks and goals."""

from dataclasses import dataclass, replace
from typing import Any

from magnetar.benchmarks.peers.runner import Task

OURS = "magnetar"
PEERS = ("transformers", "llama", "vllm")
SERVING_PEERS = ("llama", "vllm")
"""Those that take requests in while others are being answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A way to run a model: whose program, and how."""

    program: str = OURS
    model: str = "moe"
    dtype: str = "bf16"
    stages: int = 1
    threads: int = 0
    """Of each stage; 0: one for every core."""
    batch_invariant: bool = False

    @property
    def label(self) -> str:
        """For tables."""
        words = [self.program, self.model, self.dtype]
        words += [f"{self.stages}-stages"] if self.stages > 1 else []
        return "/".join([*words, "reproducible"] if self.batch_invariant else words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One comparison: `ours` against the best of `others`, or against the memory wall."""

    name: str
    ours: Engine
    others: tuple[Engine, ...]
    task: Task
    goal: float | None
    """Of the ratio; None where it is only told."""
    at_wall: bool = False
    """Compare with read bandwidth over active bytes instead."""


def _beside_peers(ours: Engine) -> tuple[Engine, ...]:
    """The same model in the same width by everybody else."""
    programs = PEERS if ours.dtype == "bf16" else ("llama",)
    return tuple(replace(ours, program=program) for program in programs)


def _decode(num_streams: int, num_tokens: int, **changes: Any) -> Task:
    return Task(kind="decode", num_streams=num_streams, num_tokens=num_tokens, **changes)


BF16 = Engine()
DEMO = Engine(model="demo")


def _prefill(num_prompt: int) -> Task:
    return Task(kind="prefill", num_prompt=num_prompt)


def _against_peers(name: str, ours: Engine, task: Task, goal: float) -> Case:
    return Case(name=name, ours=ours, others=_beside_peers(ours), task=task, goal=goal)


def _against_ours(
    name: str, ours: Engine, other: Engine, task: Task, goal: float | None = None
) -> Case:
    return Case(name=name, ours=ours, others=(other,), task=task, goal=goal)


EXACT = Engine(batch_invariant=True)
INT8, INT4 = Engine(dtype="int8"), Engine(dtype="int4")
RATES = (
    _against_peers("decode-1", BF16, _decode(1, 32), 1.0),
    Case(name="decode-1-wall", ours=BF16, others=(), task=_decode(1, 32), goal=0.85, at_wall=True),
    _against_peers("decode-8", BF16, _decode(8, 16), 1.0),
    _against_peers("decode-32", BF16, _decode(32, 12), 1.5),
    _against_peers("prefill-512", BF16, _prefill(512), 1.2),
    _against_peers("prefill-4096", BF16, _prefill(4096), 1.2),
    _against_ours("reproducible-decode-1", EXACT, BF16, _decode(1, 32)),
    _against_ours("reproducible-decode-8", EXACT, BF16, _decode(8, 16)),
    _against_ours("reproducible-decode-32", EXACT, BF16, _decode(32, 12)),
    _against_ours("reproducible-prefill-512", EXACT, BF16, _prefill(512)),
    _against_ours("stages-2", Engine(stages=2), BF16, _decode(16, 16), 0.95),
    _against_ours("stages-4", Engine(stages=4), BF16, _decode(16, 16), 0.95),
    _against_ours("int8-over-bf16", INT8, BF16, _decode(1, 32), 1.7),
    _against_peers("int8-decode-1", INT8, _decode(1, 32), 1.0),
    _against_ours("int4-over-bf16", INT4, BF16, _decode(1, 32), 2.8),
    _against_peers("int4-decode-1", INT4, _decode(1, 32), 1.0),
    _against_ours("sparse-pays", BF16, Engine(model="dense"), _decode(1, 16), 5.0),
    _against_peers("demo-decode-1", DEMO, _decode(1, 32), 1.0),
    _against_peers("demo-decode-8", DEMO, _decode(8, 16), 1.0),
)
"""Comparisons of tokens per second."""

FIRST_TOKEN, HOP, SCHEDULER, STREAMED = "first-token", "hop", "scheduler", "streamed-token"
_NAMES = [case.name for case in RATES]
_AFTER = _NAMES.index("prefill-4096") + 1
NAMES = (*_NAMES[:_AFTER], FIRST_TOKEN, *_NAMES[_AFTER:], HOP, SCHEDULER, STREAMED)
"""All cases in the order of a run: those of the same engines are neighbours, for loading takes
longer than measuring."""
QUICK = (
    *("decode-1", "decode-1-wall", "decode-8", "decode-32", "prefill-512"),
    *("reproducible-decode-1", HOP, SCHEDULER, STREAMED),
)
