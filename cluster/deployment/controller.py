"""One deployment, from its spec to serving and to its end: a Ray actor with a thread of its own."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

from ...errors import InterruptedByUserError, MagnetarError, StageLostError
from ...fetcher.checkpoint.release import ReleaseFacts, facts_to_json
from ...fetcher.piece_map import ByteRange, ranges_of
from ...fetcher.progress import PHASES, Phase, Progress
from ..journal import controller_journal
from ..plan import Pipeline, Plan
from ..planning.expert_pins import pin_experts
from ..planning.planner import plan as place_model
from ..planning.workload import workload_of
from ..runtime.ray_runtime import RayNode
from ..spec import DeploymentSpec
from .agent_group import AgentGroup
from .assignment import PipelineRoles
from .keepers import Keepers
from .pipeline_group import PipelineGroup
from .progress_board import ProgressBoard
from .shard import loading_steps, shard_of
from .status import ConditionType, Failure, Report, StageLoad
from .status_record import StatusRecord

WATCH_S: Final = 0.5
logger = logging.getLogger(__name__)
_CONDITION_OF: Final[dict[Phase, ConditionType]] = {
    "metadata": "SourceVerified",
    "plan": "PipelinePlaced",
    "download": "SourceVerified",
    "verify": "SourceVerified",
    "load": "WeightsReady",
    "warm": "StagesReady",
    "serving": "EndpointReady",
}
"""What a failure in a phase keeps from becoming true."""


class Controller:
    """Works from its creation on; `poll` tells how far it is, `stop` ends everything it started.

    A failure before serving ends everything too. A stage lost while serving does not: its pipeline
    is started again, as often as need be. Meanwhile other pipelines take the requests over, and a
    condition says so; where there is none, `Ready` is false with the reason.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        roles: PipelineRoles,
        *,
        nodes: Sequence[RayNode],
        home: str,
        detached: bool,
        api_key: str | None,
    ) -> None:
        self._spec = spec
        self._nodes = tuple(nodes)
        self._home = home
        self._api_key = api_key
        self._record = StatusRecord(spec, controller_journal(spec.name))
        self._board = ProgressBoard()
        self._open_phases: set[Phase] = set()
        self._finished_phases: set[Phase] = set()
        self._fetching: Future[None] | None = None
        self._stop = threading.Event()
        self._agents = AgentGroup(
            deployment=spec.name,
            store=spec.store,
            nodes=self._nodes,
            home=home,
            detached=detached,
            on_progress=self._publish,
            stop=self._stop,
        )
        self._pipeline = PipelineGroup(
            deployment=spec.name,
            epoch=self._record.status.epoch,
            roles=roles,
            nodes=self._nodes,
            detached=detached,
            stop=self._stop,
        )
        self._thread = threading.Thread(target=self._run, name="controller")
        self._thread.start()

    def poll(self, cursor: int) -> Report:
        """The status now, and the progress since `cursor`."""
        status = self._record.status  # before the progress, which must not lack what led to it
        progress, newer = self._board.since(cursor)
        return Report(status=status, progress=progress, cursor=newer)

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for; empty unless it serves."""
        is_ready = self._record.status.ready
        try:
            return self._pipeline.expert_tokens() if is_ready else {}
        except StageLostError:  # `poll` tells of it
            return {}

    def traffic(self) -> tuple[dict[str, Any], ...]:
        """By node, what it had from and gave to peers inside and outside; empty at the end."""
        try:
            return self._agents.traffic()
        except MagnetarError:  # `poll` tells of what ends a deployment
            return ()

    def stop(self) -> None:
        """Begin to end everything; `poll` says when that is done."""
        self._stop.set()

    def _run(self) -> None:
        try:
            self._deploy()
            self._keep()
        except Exception as error:  # crosses to the driver, which raises it again
            self._fail(error)
        finally:
            self._end()

    def _deploy(self) -> None:
        facts, plan = self._find_place()
        # Several stages may be on one node. The gateway needs the tokenizer: where its node has no
        # stage, it fetches the small files alone.
        hosts = list(dict.fromkeys([*plan.hosts, self._home]))
        self._enter("download")
        folders = self._prepare_fetch(facts, plan, hosts)
        with ThreadPoolExecutor(1, "controller-fetch") as thread:
            # Stages load what has arrived while the rest is under way.
            self._fetching = thread.submit(self._fetch, hosts)
            try:
                self._load(facts, plan, folders)
                self._fetching.result()
            except BaseException:
                self._agents.interrupt()
                raise
        self._enter("serving")
        url = self._pipeline.serve()
        self._record.change(url=url)
        self._leave("serving", url)
        self._record.hold("EndpointReady", "Listening", url)
        try:
            self._agents.end_fetches()
        except StageLostError as error:  # it serves without that agent; a restart brings another
            logger.warning("%s", error)

    def _find_place(self) -> tuple[ReleaseFacts, Plan]:
        """Metadata and plan. The port is taken first: on the node where it was asked for."""
        spec = self._spec
        self._pipeline.bind_gateway(
            self._home, listen=(spec.host, spec.port), api_key=self._api_key
        )
        self._enter("metadata")
        facts, info_hash = self._agents.read_facts(spec.source)
        self._record.change(chat_format=facts.chat_format)
        self._leave("metadata")

        self._enter("plan")
        inventory = self._agents.inventory(info_hash)
        workload = workload_of(spec, facts.config)
        plan = place_model(facts.config, facts.index, inventory, workload)
        plan = pin_experts(plan, spec.expert_pins, facts.config, facts.index, inventory)
        self._record.change(plan=plan)
        self._leave(
            "plan", "; ".join((_placement(plan), *(each.text for each in plan.concessions)))
        )
        return facts, plan

    def _prepare_fetch(
        self, facts: ReleaseFacts, plan: Plan, hosts: Sequence[str]
    ) -> dict[str, str]:
        """Tell every node what it has to bring, and in which order; the release folder on each."""
        self._agents.metadata(hosts, self._spec.source)
        if len(hosts) > 1:
            self._agents.restrict({host: self._share(facts, plan, host) for host in hosts})
        steps = {host: loading_steps(facts.index, plan, host) for host in hosts}
        self._agents.order({host: tuple(map(ranges_of, each)) for host, each in steps.items()})
        self._agents.check_disks(hosts)
        if len(self._nodes) > 1 and self._spec.source.kind != "folder":
            self._agents.divide(hosts, self._spec.wan_mbps)
        return self._agents.folders(hosts)

    def _fetch(self, hosts: Sequence[str]) -> None:
        """Download and verify on every node what its stages read; in a thread of its own."""
        self._agents.download(hosts)
        self._leave("download")
        self._enter("verify")
        self._agents.verify(hosts)
        self._leave("verify")
        self._record.hold("SourceVerified", "Verified")
        if self._spec.source.kind != "folder":
            self._record.change(fetched=self._agents.fetched(hosts))

    def _load(self, facts: ReleaseFacts, plan: Plan, folders: dict[str, str]) -> None:
        """Place the stages, load what arrives, send a token through; may end before `_fetch`."""
        facts_json = facts_to_json(facts)
        self._pipeline.brief_gateway(
            plan, self._spec, folder=folders[self._home], facts_json=facts_json
        )
        self._pipeline.place(plan, self._spec, folders=folders, facts_json=facts_json)
        self._record.hold("PipelinePlaced", "Placed", _placement(plan))
        self._enter("load")
        self._pipeline.load(plan, self._publish, on_loaded=self._note_loaded)
        self._leave("load")
        self._record.hold("WeightsReady", "Loaded")

        self._enter("warm")
        self._pipeline.connect()
        seconds = self._pipeline.warm()
        took = ", ".join(f"{each * 1000:.0f} ms" for each in seconds)
        each = " of each pipeline" * (len(seconds) > 1)
        self._leave("warm", f"one token through every stage{each} took {took}")
        self._record.hold("StagesReady", "TokenWentThrough")

    def _note_loaded(self, loads: tuple[StageLoad, ...]) -> None:
        """Keep how far the stages are; raise what ended the download, for which they would wait."""
        assert self._fetching is not None
        if self._fetching.done():
            self._fetching.result()
        if [load.num_layers for load in loads] != [
            each.num_layers for each in self._record.status.loaded
        ]:
            self._record.change(loaded=loads)

    def _share(self, facts: ReleaseFacts, plan: Plan, host: str) -> tuple[ByteRange, ...] | None:
        """What a node wants of the weights; None: all of them."""
        if host in plan.hosts and self._spec.fetch_full:
            return None
        return ranges_of(shard_of(facts.index, plan, host))

    def _keep(self) -> None:
        """Until `stop`: keep every pipeline up, and notice when the gateway dies."""
        plan = self._record.status.plan
        assert plan is not None
        keepers = Keepers(plan, group=self._pipeline, agents=self._agents, record=self._record)
        try:
            while not self._stop.wait(WATCH_S):
                if (death := self._pipeline.gateway_death()) is not None:
                    break
            else:
                raise InterruptedByUserError("the deployment was stopped")
        finally:
            keepers.stop()
        # Nobody answers any more, and no pipeline helps: the rest is for whoever started it.
        failure = Failure.of(death)
        self._record.hold("EndpointReady", "GatewayLost", str(death), status=False, failure=failure)
        self._stop.wait()
        raise InterruptedByUserError("the deployment was stopped")

    def _fail(self, error: Exception) -> None:
        stopped = isinstance(error, InterruptedByUserError) or self._stop.is_set()
        if stopped and not isinstance(error, InterruptedByUserError):
            error = InterruptedByUserError("the deployment was stopped")
        reason = "Stopped" if stopped else type(error).__name__
        condition = "EndpointReady" if stopped else self._kept_from(error)
        failure = self._record.status.failure or Failure.of(error)
        self._record.hold(condition, reason, str(error), status=False, failure=failure, url=None)

    def _kept_from(self, error: Exception) -> ConditionType:
        """The condition that a failure keeps from becoming true."""
        fetching = self._fetching
        if fetching is not None and fetching.done() and fetching.exception() is error:
            return "SourceVerified"
        # Where several phases are under way, the download would have said so itself.
        return _CONDITION_OF[max(self._open_phases, key=PHASES.index, default="metadata")]

    def _end(self) -> None:
        failure = self._record.status.failure
        try:
            self._pipeline.stop()
            self._agents.stop()
        except Exception as error:  # the end is reached all the same; the first failure counts
            failure = failure or Failure.of(error)
        finally:
            self._record.change(failure=failure, finished=True)

    def _enter(self, phase: Phase) -> None:
        self._open_phases.add(phase)
        self._record.change(phase=min(self._open_phases, key=PHASES.index))
        self._publish(Progress(phase=phase))

    def _leave(self, phase: Phase, message: str = "") -> None:
        self._open_phases.discard(phase)
        if self._open_phases:
            self._record.change(phase=min(self._open_phases, key=PHASES.index))
        if phase not in self._finished_phases:
            self._publish(Progress(phase=phase, message=message, finished=True))

    def _publish(self, progress: Progress) -> None:
        self._record.note_room(progress)
        if len(self._nodes) == 1:
            progress = replace(progress, node="")
        if progress.finished and not progress.node:
            self._finished_phases.add(progress.phase)
        self._board.publish(progress)


def _placement(plan: Plan) -> str:
    each = "; ".join(map(_placed, plan.pipelines))
    return f"{len(plan.pipelines)} pipelines: {each}" if len(plan.pipelines) > 1 else each


def _placed(pipeline: Pipeline) -> str:
    hosts = dict.fromkeys(stage.host for stage in pipeline.stages)
    helpers = [host for host in pipeline.hosts if host not in hosts]
    return (
        f"{len(pipeline.stages)} stage{'s' * (len(pipeline.stages) > 1)} on {', '.join(hosts)}"
        + f", experts on {', '.join(helpers)} too" * bool(helpers)
    )
