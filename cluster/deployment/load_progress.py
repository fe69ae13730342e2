"""How far the pipelines are with reading their weights, in all and by node."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final

from ...fetcher.progress import Progress
from ..plan import Plan
from .status import StageLoad

TELLING_SHARE: Final = 0.1
"""Of the bytes, from which on they tell of a rate."""


def load_progress(
    plan: Plan,
    loads: Sequence[StageLoad],
    helped_bytes: Sequence[int],
    *,
    seconds: float,
    finished: bool,
) -> Iterator[Progress]:
    """A reading of every node of several, then that of all of them.

    `loads` are of the stages of the plan in order, `helped_bytes` of their helpers.
    """
    done: dict[str, int] = {}
    total: dict[str, int] = {}
    layers: dict[str, list[StageLoad]] = {}

    def add(host: str, num_bytes: int, weights_bytes: int) -> None:
        # What is converted while it is read may take more than was planned for.
        done[host] = done.get(host, 0) + (
            weights_bytes if finished else min(num_bytes, weights_bytes)
        )
        total[host] = total.get(host, 0) + weights_bytes

    for stage, load in zip(plan.stages, loads, strict=True):
        add(stage.host, load.num_bytes, stage.weights_bytes)
        layers.setdefault(stage.host, []).append(load)
    helpers = [helper for stage in plan.stages for helper in stage.helpers]
    for helper, num_bytes in zip(helpers, helped_bytes, strict=True):
        add(helper.host, num_bytes, helper.weights_bytes)

    def reading(hosts: Sequence[str], own: Sequence[StageLoad], *, node: str = "") -> Progress:
        done_bytes = sum(done[host] for host in hosts)
        total_bytes = sum(total[host] for host in hosts)
        # Processes start and the download goes on: the first bytes say nothing of the last.
        is_telling = seconds > 0 and done_bytes >= total_bytes * TELLING_SHARE
        return Progress(
            phase="load",
            done_bytes=done_bytes,
            total_bytes=total_bytes,
            rate_bytes_per_s=done_bytes / seconds if is_telling else 0.0,
            message=layers_ready(own),
            node=node,
            finished=finished,
            num_layers=sum(load.num_layers for load in own),
            total_layers=sum(load.total_layers for load in own),
        )

    if len(total) > 1:
        for host in total:
            yield reading([host], layers.get(host, []), node=host)
    yield reading(list(total), loads)


def layers_ready(loads: Sequence[StageLoad]) -> str:
    """``layers ready 5/16 7/16``: of each stage, in order; nothing where there is none.

    Those of several pipelines are set apart by a bar.
    """
    counts = " | ".join(
        " ".join(f"{load.num_layers}/{load.total_layers}" for load in own)
        for _, own in groupby(loads, key=attrgetter("pipeline"))
    )
    return f"layers ready {counts}" if counts else ""
