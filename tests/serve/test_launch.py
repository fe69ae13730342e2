"""What commands find out about deployments before any Ray is started."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from magnetar.cluster.journal import deployment_record
from magnetar.cluster.machines import Device, Inventory, Node
from magnetar.cluster.plan import NodeWish
from magnetar.cluster.runtime.process_mark import ProcessMark
from magnetar.cluster.spec import DeploymentSpec, SourceSpec
from magnetar.errors import InfeasiblePlanError, NotFoundError, UsageError
from magnetar.serve import launch, session
from magnetar.serve.launch import PlanPreview, Running, down, plan_only, status, up
from magnetar.tests.planning import SMALL
from magnetar.tests.releases import write_release


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path / "home"))


@pytest.fixture
def spec(tmp_path: Path) -> DeploymentSpec:
    source = SourceSpec(kind="folder", location=str(tmp_path / "release"))
    store = str(tmp_path / "store")
    return DeploymentSpec(name="mine", source=source, store=store, model_name="m", port=0)


def start(spec: DeploymentSpec) -> None:
    up(spec, on_progress=lambda progress: None, stop=threading.Event())


def remember(mark: ProcessMark) -> None:
    command = {"pid": mark.pid, "started": mark.started}
    record = {"name": "mine", "address": "127.0.0.1:9", "head": None, "command": command}
    deployment_record("mine").write(record)


def test_a_name_that_is_taken_is_refused(spec: DeploymentSpec) -> None:
    remember(ProcessMark.of_this_process())
    with pytest.raises(UsageError, match="magnetar down mine"):
        start(spec)


def test_a_deployment_whose_process_was_killed_is_lost_until_it_is_taken_down() -> None:
    remember(replace(ProcessMark.of_this_process(), started=0.0))
    (found,) = status("mine")
    assert (found["phase"], found["ready"]) == ("lost", False)
    assert "magnetar down mine" in found["message"]
    down("mine")
    assert status() == []


def test_whoever_interrupts_down_leaves_the_deployment_to_end_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(address: str) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "joined_ray", interrupted)
    monkeypatch.setattr(launch, "stop_head", lambda mark: pytest.fail("its Ray was ended"))
    head = ProcessMark.of_this_process()
    record = {"name": "mine", "address": "a:1", "command": None}
    deployment_record("mine").write(record | {"head": {"pid": head.pid, "started": head.started}})
    with pytest.raises(KeyboardInterrupt):
        down("mine")
    assert deployment_record("mine").read() is not None


def test_unknown_names_are_not_found() -> None:
    with pytest.raises(NotFoundError, match="no deployment 'mine'"):
        status("mine")
    with pytest.raises(NotFoundError, match="no deployment 'mine'"):
        down("mine")


def test_others_may_not_reach_it_without_a_key(spec: DeploymentSpec) -> None:
    with pytest.raises(UsageError, match="no API key"):
        start(replace(spec, host="0.0.0.0"))


def test_a_key_file_that_is_missing_or_empty_is_said(spec: DeploymentSpec, tmp_path: Path) -> None:
    key = tmp_path / "key"
    with pytest.raises(NotFoundError, match="cannot be read"):
        start(replace(spec, api_key_file=str(key)))
    key.write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        start(replace(spec, api_key_file=str(key)))


def test_a_plan_of_this_machine_needs_no_ray(spec: DeploymentSpec, tmp_path: Path) -> None:
    write_release(tmp_path / "release", layout="huggingface")
    wanted = replace(spec, num_stages=3, max_concurrency=2)
    preview = plan_only(wanted, on_progress=lambda progress: None, stop=threading.Event())
    assert len(preview.plan.stages) == 3
    assert preview.plan.max_context_tokens == preview.config.max_context_tokens
    with pytest.raises(InfeasiblePlanError):
        plan_only(
            replace(wanted, max_concurrency=10**9),
            on_progress=lambda progress: None,
            stop=threading.Event(),
        )


def test_what_runs_has_its_times_though_it_is_not_what_is_wished_now(spec: DeploymentSpec) -> None:
    device = Device(kind="cpu", memory_bytes=4 * 10**9, read_gbps=50.0)
    nodes = tuple(Node(host=h, address="", num_cpus=2, devices=(device,)) for h in ("a", "b"))

    def preview(running: Running | None, *wishes: NodeWish) -> PlanPreview:
        return plan_only(
            replace(spec, node_wishes=wishes),
            inventory=Inventory(nodes=nodes),
            described=SMALL,
            running=running,
            on_progress=lambda progress: None,
            stop=threading.Event(),
        )

    runs = preview(None).plan
    (host,) = runs.hosts
    then = preview(Running(plan=runs, expert_tokens={}), NodeWish(host=host, layers=(0, 2)))
    assert then.plan.hosts != runs.hosts
    assert then.running is not None
    assert then.running.prediction is not None
    assert runs.prediction is not None
    assert then.running.prediction.tokens_per_s == pytest.approx(runs.prediction.tokens_per_s)


def test_whoever_names_no_deployment_of_a_cluster_is_told_those_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get_actor(name: str, namespace: str) -> NoReturn:
        raise ValueError(name)

    monkeypatch.setattr("ray.get_actor", get_actor)
    for there, said in (
        (["a", "b"], "no deployment 'c'; it has a, b"),
        ([], "nothing is deployed"),
    ):
        monkeypatch.setattr(session, "deployments", lambda there=there: there)
        with pytest.raises(NotFoundError, match=said):
            session.find_controller("c")
