"""The conversation of a command with the controller of a deployment."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from ..cluster.deployment.assignment import PipelineRoles
from ..cluster.deployment.controller import Controller
from ..cluster.deployment.status import DeploymentStatus, Report
from ..cluster.runtime.ray_calls import call
from ..cluster.runtime.ray_runtime import NAMESPACE, home_node, ray_nodes
from ..cluster.spec import DeploymentSpec
from ..errors import InterruptedByUserError, NotFoundError, StageLostError, UsageError
from ..fetcher.progress import ProgressSink
from .gateway_actor import GatewayActor
from .helper_actor import HelperActor
from .stage_actor import StageActor

POLL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 60.0
_METHODS_AT_ONCE: Final = 4


class Session:
    """The conversation with one controller."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._cursor = 0

    def poll(self) -> Report:
        """The status now, and the progress since the last time."""
        report = call(self._controller.poll.remote(self._cursor), who="the controller")
        assert isinstance(report, Report)
        self._cursor = report.cursor
        return report

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for; empty unless it serves."""
        told = call(self._controller.expert_tokens.remote(), who="the controller")
        return dict(told)

    def traffic(self) -> list[dict[str, Any]]:
        """By node, what it had from and gave to peers inside and outside."""
        return list(call(self._controller.traffic.remote(), who="the controller"))

    def until_serving(self, on_progress: ProgressSink, stop: threading.Event) -> DeploymentStatus:
        """Pass progress on until the deployment answers; raises what kept it from that."""
        while True:
            report = self.poll()
            for progress in report.progress:
                on_progress(progress)
            if report.status.failure is not None:
                self.until(lambda status: status.finished)
                raise report.status.failure.to_error()
            if report.status.ready:
                return report.status
            if stop.wait(POLL_S):
                raise InterruptedByUserError("stopped; what was downloaded and verified is kept")

    def until(self, reached: Callable[[DeploymentStatus], bool]) -> None:
        """Wait for a status, at most `STOP_TIMEOUT_S`."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not reached(self.poll().status) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End what the controller started, then the controller."""
        import ray

        with contextlib.suppress(StageLostError):  # it has ended already
            self._controller.stop.remote()
            self.until(lambda status: status.finished)
        ray.kill(self._controller)


def start_controller(spec: DeploymentSpec, *, api_key: str | None, detached: bool) -> Any:
    """A controller on the head of the cluster that is connected; the deployment begins.

    Raises:
        UsageError: there is one of that name.
    """
    import ray

    nodes = ray_nodes()
    try:
        return (
            ray.remote(Controller)
            .options(
                name=f"{spec.name}/controller",
                lifetime="detached" if detached else None,
                num_cpus=0,
                max_concurrency=_METHODS_AT_ONCE,
                resources={"node:__internal_head__": 0.001},
            )
            .remote(
                spec,
                PipelineRoles(stage=StageActor, helper=HelperActor, gateway=GatewayActor),
                nodes=nodes,
                home=home_node(nodes).host,
                detached=detached,
                api_key=api_key,
            )
        )
    except ValueError as error:
        raise already_up(spec.name) from error


def deployments() -> list[str]:
    """Names of the deployments of the cluster that is connected."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    names = (actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)
    return sorted(
        name.removesuffix("/controller") for name in names if name.endswith("/controller")
    )


def find_controller(name: str) -> Any:
    """The controller of a deployment of the cluster that is connected; else NotFoundError."""
    import ray

    try:
        return ray.get_actor(f"{name}/controller", namespace=NAMESPACE)
    except ValueError as error:
        there = ", ".join(deployments())
        raise NotFoundError(
            f"the Ray cluster has no deployment {name!r}; "
            + (f"it has {there}" if there else "nothing is deployed there")
        ) from error


def already_up(name: str) -> UsageError:
    """What to say about a second deployment of the same name."""
    return UsageError(
        f"a deployment {name!r} exists already; end it with `magnetar down {name}`, "
        "or give this one another --name"
    )
