"""The controller with real actors and a fake pipeline: phases, failures, faults, the end."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magnetar.cluster.deployment.assignment import PipelineRoles
from magnetar.cluster.deployment.controller import Controller
from magnetar.cluster.deployment.pipeline_group import PipelineGroup
from magnetar.cluster.deployment.status import (
    Condition,
    DeploymentStatus,
    Report,
    StageLoad,
)
from magnetar.cluster.journal import controller_journal
from magnetar.cluster.plan import Pipeline, Plan
from magnetar.cluster.runtime.ray_calls import call
from magnetar.cluster.runtime.ray_runtime import NAMESPACE, home_node, local_ray, ray_nodes
from magnetar.cluster.spec import DeploymentSpec, SourceSpec
from magnetar.errors import NotFoundError, PortInUseError, StageLostError
from magnetar.fetcher.progress import PHASES, Progress
from magnetar.tests.cluster.test_plan import STAGE
from magnetar.tests.fake_roles import FakeGateway, FakeHelper, FakeStage
from magnetar.tests.lab.test_full_disk import fill, small_disk
from magnetar.tests.releases import write_release
from magnetar.tests.seeder import seeding

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with local_ray():
        import ray

        yield ray


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, layout="huggingface")
    return folder


@pytest.fixture
def spec(release: Path, tmp_path: Path) -> DeploymentSpec:
    return DeploymentSpec(
        name=tmp_path.name[:40],
        source=SourceSpec(kind="folder", location=str(release)),
        store=str(tmp_path / "{host}"),
        model_name="tiny",
        num_stages=2,
        max_concurrency=1,
        port=3,
    )


@contextmanager
def controlled(ray: Any, spec: DeploymentSpec) -> Iterator[Any]:
    nodes = ray_nodes()
    controller = (
        ray.remote(Controller)
        .options(name=f"{spec.name}/controller", num_cpus=0, max_concurrency=4)
        .remote(
            spec,
            PipelineRoles(stage=FakeStage, helper=FakeHelper, gateway=FakeGateway),
            nodes=nodes,
            home=home_node(nodes).host,
            detached=False,
            api_key=None,
        )
    )
    try:
        yield controller
    finally:
        controller.stop.remote()
        status_when(controller, lambda status: status.finished)
        ray.kill(controller)


def poll(controller: Any, cursor: int = 0) -> Report:
    report = call(controller.poll.remote(cursor), who="the controller")
    assert isinstance(report, Report)
    return report


def news(controller: Any) -> tuple[Progress, ...]:
    return poll(controller).progress


def status_when(controller: Any, reached: Callable[[DeploymentStatus], bool]) -> DeploymentStatus:
    deadline = time.monotonic() + 60
    while not reached(status := poll(controller).status):
        assert time.monotonic() < deadline, status
        threading.Event().wait(0.05)
    return status


def actor_names(ray: Any, spec: DeploymentSpec) -> set[str]:
    names = {row["name"] for row in ray.util.list_named_actors(all_namespaces=True)}
    return {name.removeprefix(spec.name) for name in names if name.startswith(spec.name)}


@contextmanager
def placed(spec: DeploymentSpec, num_stages: tuple[int, ...]) -> Iterator[PipelineGroup]:
    """Pipelines with so many stages each, all of them on this node and serving."""
    nodes = ray_nodes()
    host = home_node(nodes).host
    plan = Plan(
        pipelines=tuple(
            Pipeline(
                stages=tuple(
                    replace(STAGE, index=n, host=host, weights_bytes=10, kv_bytes=10, helpers=())
                    for n in range(count)
                ),
                num_kv_blocks=4 + count,
                max_concurrency=count,
                max_step_tokens=128 * count,
            )
            for count in num_stages
        ),
        max_context_tokens=16,
    )
    group = PipelineGroup(
        deployment=spec.name,
        epoch=3,
        roles=PipelineRoles(stage=FakeStage, helper=FakeHelper, gateway=FakeGateway),
        nodes=nodes,
        detached=False,
        stop=threading.Event(),
    )
    try:
        group.bind_gateway(host, listen=("127.0.0.1", 3), api_key=None)
        group.brief_gateway(plan, spec, folder="/", facts_json="{}")
        group.place(plan, spec, folders={host: "/"}, facts_json="{}")
        loads: list[tuple[StageLoad, ...]] = []
        progress: list[Progress] = []
        group.load(plan, progress.append, on_loaded=loads.append)
        assert [(each.pipeline, each.index) for each in loads[-1]] == [
            (number, index) for number, count in enumerate(num_stages) for index in range(count)
        ]
        group.connect()
        assert len(group.warm()) == len(num_stages)
        yield group
    finally:
        group.stop()


def test_serves_after_every_phase_and_leaves_nothing_behind(ray: Any, spec: DeploymentSpec) -> None:
    with controlled(ray, spec) as controller:
        status = status_when(controller, lambda status: status.ready or status.finished)
        assert status.failure is None
        assert status.url is not None
        assert status.plan is not None
        assert {condition.status for condition in status.conditions} == {True}
        finished = {p.phase for p in poll(controller).progress if p.finished and not p.node}
        assert finished == set(PHASES)
        host = status.plan.stages[0].host
        assert actor_names(ray, spec) == {
            "/controller",
            f"/agent/{host}",
            "/g1/gateway",
            "/g1/s0",
            "/g1/s1",
        }
        first, second = (
            ray.get(ray.get_actor(f"{spec.name}/g1/s{i}", namespace=NAMESPACE).facts.remote())
            for i in (0, 1)
        )
        assert (first[1], second[1]) == ("127.0.0.1:1", "127.0.0.1:9")
        assert first[0].stage.end_layer == second[0].stage.first_layer
        assert call(controller.expert_tokens.remote(), who="the controller") == {0: (3, 1)}
        record = controller_journal(spec.name).read()
        assert record is not None
        assert record["status"]["ready"] is True

        controller.stop.remote()
        status_when(controller, lambda status: status.finished)
        deadline = time.monotonic() + 20
        while actor_names(ray, spec) != {"/controller"}:
            assert time.monotonic() < deadline, actor_names(ray, spec)
            threading.Event().wait(0.05)


def is_kept(status: DeploymentStatus, num_restarts: int = 0) -> bool:
    """Pipelines are watched, a moment after they serve, and were started again so often."""
    restarts = [pipeline.num_restarts for pipeline in status.pipelines]
    return status.ready and bool(restarts) and max(restarts) >= num_restarts


def condition_of(status: DeploymentStatus, kind: str) -> Condition:
    (found,) = (condition for condition in status.conditions if condition.type == kind)
    return found


def test_a_stage_that_dies_makes_it_unready_with_the_reason_until_it_is_started_again(
    ray: Any, spec: DeploymentSpec
) -> None:
    with controlled(ray, spec) as controller:
        status = status_when(controller, is_kept)
        assert [(each.state, each.num_restarts) for each in status.pipelines] == [("up", 0)]
        before = actor_names(ray, spec)
        ray.get_actor(f"{spec.name}/g1/s1", namespace=NAMESPACE).crash.remote()
        status = status_when(controller, lambda status: not status.ready)
        assert condition_of(status, "Ready").reason == "PipelineLost"
        assert "stage 1 died" in condition_of(status, "Ready").message
        assert status.failure is None
        status = status_when(controller, lambda status: status.ready)
        (pipeline,) = status.pipelines
        assert (pipeline.state, pipeline.num_restarts, pipeline.num_failures) == ("up", 1, 1)
        assert "stage 1 died" in pipeline.cause
        up = condition_of(status, "AllPipelinesUp")
        assert (up.status, up.reason) == (True, "Restarted")
        assert up.message.startswith("back after: stage 1 died")
        assert up.message.endswith("(started again once so far)")
        assert before - {"/g1/s0", "/g1/s1"} < actor_names(ray, spec)
        assert {"/g1/r1/s0", "/g1/r1/s1"} < actor_names(ray, spec)


def test_an_agent_that_died_is_there_again_when_a_pipeline_is_started_again(
    ray: Any, spec: DeploymentSpec, release: Path
) -> None:
    def agent() -> Any:
        host = ray_nodes()[0].host
        return ray.get_actor(f"{spec.name}/agent/{host}", namespace=NAMESPACE)

    with (
        seeding(release) as seed,
        controlled(
            ray, replace(spec, source=SourceSpec(kind="magnet", location=seed.magnet))
        ) as controller,
    ):
        status = status_when(controller, lambda status: status.ready or status.finished)
        assert status.failure is None
        (before,) = status.fetched
        assert before.received_bytes > 0
        ray.kill(agent())
        ray.get_actor(f"{spec.name}/g1/s0", namespace=NAMESPACE).crash.remote()
        status_when(controller, lambda status: is_kept(status, num_restarts=1))
        # It has what there is to load again, and brought none of it from anywhere.
        assert ray.get(agent().wait.remote((), 1.0))
        assert ray.get(agent().load_checks.remote()).metainfo is not None
        assert ray.get(agent().traffic.remote())["received_bytes"] == 0


def test_a_gateway_that_dies_is_a_failure(ray: Any, spec: DeploymentSpec) -> None:
    with controlled(ray, spec) as controller:
        status_when(controller, is_kept)
        ray.get_actor(f"{spec.name}/g1/gateway", namespace=NAMESPACE).crash.remote()
        status = status_when(controller, lambda status: status.failure is not None)
        assert condition_of(status, "Ready").reason == "GatewayLost"
        assert status.failure is not None
        assert isinstance(status.failure.to_error(), StageLostError)
        assert "the gateway died" in status.failure.message


def test_a_taken_port_ends_it_with_its_own_error(ray: Any, spec: DeploymentSpec) -> None:
    with controlled(ray, replace(spec, port=1)) as controller:
        status = status_when(controller, lambda status: status.finished)
        assert status.failure is not None
        assert isinstance(status.failure.to_error(), PortInUseError)
        assert status.failure.message == "port 1 is in use"


def test_a_pipeline_that_does_not_get_warm_ends_it(ray: Any, spec: DeploymentSpec) -> None:
    with controlled(ray, replace(spec, port=2)) as controller:
        status = status_when(controller, lambda status: status.finished)
        assert status.failure is not None
        assert status.failure.message == "stage 0 does not answer"


def test_an_error_of_an_agent_keeps_its_class(ray: Any, spec: DeploymentSpec) -> None:
    source = SourceSpec(kind="folder", location="/nowhere")
    with controlled(ray, replace(spec, source=source)) as controller:
        status = status_when(controller, lambda status: status.finished)
        assert status.failure is not None
        assert isinstance(status.failure.to_error(), NotFoundError)


def test_a_node_that_waits_for_room_is_a_condition_until_there_is_some(
    ray: Any, spec: DeploymentSpec, release: Path, tmp_path: Path
) -> None:
    def waits(status: DeploymentStatus) -> bool:
        return any(condition.type == "DiskHasRoom" for condition in status.conditions)

    disk = tmp_path / "disk"
    with (
        small_disk(disk, num_bytes=16_000_000),
        seeding(release, upload_bytes_per_s=1_000_000) as seed,
    ):
        source = SourceSpec(kind="magnet", location=seed.magnet)
        with controlled(ray, replace(spec, source=source, store=str(disk))) as controller:
            deadline = time.monotonic() + 60
            while not any(each.phase == "download" and each.parts for each in news(controller)):
                assert time.monotonic() < deadline
                threading.Event().wait(0.05)
            fill(disk / "ballast")
            status = status_when(controller, lambda status: waits(status) or status.finished)
            (condition,) = (each for each in status.conditions if each.type == "DiskHasRoom")
            assert (condition.status, condition.reason) == (False, "DiskFull")
            assert condition.message.startswith(f"{ray_nodes()[0].host}: paused: ")
            (disk / "ballast").unlink()
            status = status_when(controller, lambda status: status.ready or status.finished)
            assert status.failure is None
            assert not waits(status)


def test_each_of_several_pipelines_has_a_ring_and_one_that_is_lost_starts_again_alone(
    ray: Any, spec: DeploymentSpec
) -> None:
    spec = replace(spec, max_running=9, max_waiting=5)

    def actor(name: str) -> Any:
        return ray.get_actor(f"{spec.name}/g3/{name}", namespace=NAMESPACE)

    with placed(spec, (1, 2)) as group:
        everybody = {"/g3/gateway", "/g3/p0/s0", "/g3/p1/s0", "/g3/p1/s1"}
        assert actor_names(ray, spec) == everybody
        told = {name: ray.get(actor(name).facts.remote()) for name in ("p0/s0", "p1/s0", "p1/s1")}
        assert {facts[0].links.ring for facts in told.values()} == {
            f"{spec.name}/p0",
            f"{spec.name}/p1",
        }
        # Stages listen at their index, the gateway at 9 and 10.
        downstream = {name: facts[1].split(":")[1] for name, facts in told.items()}
        assert downstream == {"p0/s0": "9", "p1/s0": "1", "p1/s1": "10"}
        _, told_rings, _ = ray.get(actor("gateway").facts.remote())
        rings = [told_rings[0], told_rings[1]]
        assert [r.max_step_tokens for r in rings] == [128, 256]
        assert [(r.num_kv_blocks, r.max_running, r.max_waiting, r.speed) for r in rings] == [
            (5, 5, 3, 1.0),
            (6, 5, 3, 2.0),
        ]

        assert group.lost(1, 0.05) is None
        actor("p1/s1").crash.remote()
        assert "stage 1 of pipeline 1 died" in str(group.lost(1, 20))
        assert group.lost(0, 0.05) is None
        group.clear(1)
        deadline = time.monotonic() + 20
        while actor_names(ray, spec) != {"/g3/gateway", "/g3/p0/s0"}:
            assert time.monotonic() < deadline, actor_names(ray, spec)
            threading.Event().wait(0.05)

        group.start_again(1)
        assert actor_names(ray, spec) == everybody - {"/g3/p1/s0", "/g3/p1/s1"} | {
            "/g3/p1/r1/s0",
            "/g3/p1/r1/s1",
        }
        again, downstream_again = ray.get(actor("p1/r1/s1").facts.remote())
        assert downstream_again.split(":")[1] == "10"
        before = told["p1/s1"][0]
        assert again.links.epoch > before.links.epoch
        assert replace(again, links=before.links) == before
        _, told_rings, admitted = ray.get(actor("gateway").facts.remote())
        assert told_rings[1].links.epoch == again.links.epoch
        assert told_rings[0] == rings[0]
        assert admitted == [1]
        assert group.lost(1, 0.05) is None
