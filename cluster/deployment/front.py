"""The gateway of a deployment as the pipelines behind it see it."""

import threading
from collections.abc import Iterable
from typing import Any, Final

from ...errors import MagnetarError
from ..plan import Plan
from ..runtime.ray_calls import call, endings, gather
from ..runtime.ray_runtime import RayNode
from ..spec import DeploymentSpec
from .assignment import GatewayAssignment, LinkSetup, RingAssignment

WARM_TIMEOUT_S: Final = 300.0
_METHODS_AT_ONCE: Final = 16
"""Each pipeline may be connecting, besides what is asked meanwhile."""


class Front:
    """Starts the gateway's actor on a node, with a port of its own; its owner ends it."""

    def __init__(
        self,
        role: type[Any],
        *,
        node: RayNode,
        name: str,
        lifetime: str | None,
        listen: tuple[str, int],
        api_key: str | None,
        stop: threading.Event,
    ) -> None:
        """Takes the port.

        Raises:
            PortInUseError, UsageError: it cannot be had.
        """
        import ray

        self.host = node.host
        self._stop = stop
        self._briefing: Any = None
        self.actor: Any = (
            ray.remote(role)
            .options(
                name=name,
                lifetime=lifetime,
                num_cpus=0,
                max_concurrency=_METHODS_AT_ONCE,
                label_selector=node.selector,
            )
            .remote(*listen, api_key)
        )
        gather([self.actor.bind.remote()], who="the gateway", stop=stop)
        self._running: Any = self.actor.run.remote()

    def brief(self, plan: Plan, spec: DeploymentSpec, *, folder: str, facts_json: str) -> None:
        """Tell it what it will serve; it reads the tokenizer until `briefing` is over."""
        self._briefing = self.actor.brief.remote(
            GatewayAssignment(
                num_pipelines=len(plan.pipelines),
                folder=folder,
                facts_json=facts_json,
                max_context_tokens=plan.max_context_tokens,
                model_name=spec.model_name,
            )
        )

    @property
    def briefing(self) -> Any:
        """The call to wait for."""
        return self._briefing

    def warm(self, numbers: Iterable[int]) -> list[float]:
        """Send one token through every stage of these pipelines; the seconds it took in each."""
        seconds = gather(
            [self.actor.warm.remote(number) for number in numbers],
            who="the gateway",
            stop=self._stop,
            timeout_s=WARM_TIMEOUT_S,
        )
        return [float(each) for each in seconds]

    def serve(self) -> str:
        """Open the API; its URL on the gateway's node."""
        return str(call(self.actor.serve.remote(), who="the gateway"))

    def admit(self, number: int) -> None:
        """Let requests go to a pipeline that was started again."""
        call(self.actor.admit.remote(number), who="the gateway")

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for, as the gateway knows it."""
        told = call(self.actor.expert_tokens.remote(), who="the gateway")
        return {int(layer): tuple(counts) for layer, counts in told.items()}

    def death(self) -> MagnetarError | None:
        """What ended its process; None while it lives."""
        (ended,) = endings([self._running], ["the gateway"], timeout_s=0) or (None,)
        return None if ended is None else ended.error


def ring_assignment(
    plan: Plan, spec: DeploymentSpec, links: LinkSetup, number: int
) -> RingAssignment:
    """What the engine of one pipeline needs to know."""
    pipeline, num_pipelines = plan.pipelines[number], len(plan.pipelines)
    max_running = spec.running_limit
    if spec.max_running is not None:  # what was asked for is for all together
        max_running = -(-spec.max_running // num_pipelines)
    return RingAssignment(
        links=links,
        num_stages=pipeline.steps_at_once,
        max_step_tokens=pipeline.max_step_tokens,
        num_kv_blocks=pipeline.num_kv_blocks,
        max_running=max_running,
        max_waiting=-(-spec.max_waiting // num_pipelines),
        speed=_speeds(plan)[number],
    )


def _speeds(plan: Plan) -> list[float]:
    """Of each pipeline against the others: as predicted, or else by what fits at once."""
    told = [each.prediction.tokens_per_s for each in plan.pipelines if each.prediction is not None]
    if len(told) == len(plan.pipelines):
        return told
    return [float(each.max_concurrency) for each in plan.pipelines]
