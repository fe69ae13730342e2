"""The keepers of all pipelines, and what the status says of how they are."""

import threading
from collections.abc import Sequence

from ...errors import MagnetarError
from ..plan import Plan
from ..runtime.ray_runtime import living_nodes
from .agent_group import AgentGroup
from .health import PipelineHealth, verdict
from .pipeline_group import PipelineGroup
from .pipeline_keeper import PipelineKeeper
from .status_record import StatusRecord


class Keepers:
    """Keep every pipeline of a plan up from their creation, once all serve, until `stop`."""

    def __init__(
        self, plan: Plan, *, group: PipelineGroup, agents: AgentGroup, record: StatusRecord
    ) -> None:
        self._record = record
        self._health: dict[int, PipelineHealth] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._keepers = [
            PipelineKeeper(
                number,
                _Kept(number, pipeline.hosts, group=group, agents=agents),
                on_change=self._note,
                stop=self._over,
            )
            for number, pipeline in enumerate(plan.pipelines)
        ]
        for keeper in self._keepers:
            self._note(keeper.health)
        for keeper in self._keepers:
            keeper.start()

    def stop(self) -> None:
        """Start nothing any more, and wait for what is being started."""
        self._over.set()
        for keeper in self._keepers:
            keeper.join()

    def _note(self, health: PipelineHealth) -> None:
        """Keep how one pipeline is, and what all of them together mean; for any thread."""
        with self._lock:
            self._health[health.number] = health
            healths = tuple(self._health[number] for number in sorted(self._health))
            told = verdict(healths)
            fields = {"pipelines": healths}
            if told.reason == "Serving":
                self._record.change(**fields)
                return
            reason, message = told.reason, told.message
            self._record.hold("AllPipelinesUp", reason, message, status=told.all_up, **fields)
            if told.any_up:
                self._record.hold("StagesReady", "TokenWentThrough")
            else:
                self._record.hold("StagesReady", reason, message, status=False)


class _Kept:
    """One pipeline, as its keeper sees it."""

    def __init__(
        self, number: int, hosts: Sequence[str], *, group: PipelineGroup, agents: AgentGroup
    ) -> None:
        self._number = number
        self._hosts = tuple(hosts)
        self._group = group
        self._agents = agents

    def lost(self, timeout_s: float) -> MagnetarError | None:
        return self._group.lost(self._number, timeout_s)

    def clear(self) -> None:
        self._group.clear(self._number)

    def missing(self) -> tuple[str, ...]:
        return self._group.missing(self._number)

    def start(self) -> None:
        nodes = living_nodes()
        self._agents.renew([nodes[host] for host in self._hosts if host in nodes])
        self._group.start_again(self._number)
