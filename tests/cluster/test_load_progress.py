"""How far a pipeline is with reading its weights: of each node, and of all."""

from dataclasses import replace

from magnetar.cluster.deployment.load_progress import layers_ready, load_progress
from magnetar.cluster.deployment.status import StageLoad
from magnetar.cluster.plan import ExpertHost, Pipeline, Plan
from magnetar.fetcher.progress import Progress
from magnetar.tests.cluster.test_plan import STAGE

HELPER = ExpertHost(
    host="c", device="cpu", num_threads=1, weights_bytes=50, free_bytes=0, experts=((1,),)
)


def readings(*loaded: int, helped: int = 0, finished: bool = False) -> dict[str, Progress]:
    """Of three stages of 100 bytes and two layers on a, b and a again, and a helper on c."""
    stages = tuple(
        replace(
            STAGE, index=number, host=host, weights_bytes=100, helpers=(HELPER,) * (number == 1)
        )
        for number, host in enumerate("aba")
    )
    pipeline = Pipeline(stages=stages, num_kv_blocks=1, max_concurrency=1)
    plan = Plan(pipelines=(pipeline,), max_context_tokens=16)
    loads = [
        StageLoad(index=number, num_layers=num_bytes // 50, total_layers=2, num_bytes=num_bytes)
        for number, num_bytes in enumerate(loaded)
    ]
    told = load_progress(plan, loads, [helped], seconds=2.0, finished=finished)
    return {progress.node: progress for progress in told}


def test_a_node_counts_all_that_lies_on_it() -> None:
    told = readings(100, 50, 60, helped=20)
    assert {node: (each.done_bytes, each.total_bytes) for node, each in told.items()} == {
        "a": (160, 200),
        "b": (50, 100),
        "c": (20, 50),
        "": (230, 350),
    }
    assert (told["a"].num_layers, told["a"].total_layers) == (3, 4)
    assert told["a"].message == "layers ready 2/2 1/2"
    assert told["c"].message == ""
    assert told[""].message == "layers ready 2/2 1/2 1/2"
    assert told[""].rate_bytes_per_s == 115


def test_the_first_bytes_tell_of_no_rate() -> None:
    assert readings(10, 0, 0)[""].rate_bytes_per_s == 0


def test_weights_that_grew_while_they_were_read_are_not_more_than_all() -> None:
    assert readings(130, 100, 100, helped=70)[""].done_bytes == 350
    assert {each.done_bytes for each in readings(0, 0, 0, finished=True).values()} == {
        200,
        100,
        50,
        350,
    }


def test_layers_of_several_pipelines_are_set_apart() -> None:
    loads = [
        StageLoad(pipeline=number // 2, index=number % 2, num_layers=n, total_layers=4, num_bytes=0)
        for number, n in enumerate((1, 2, 3))
    ]
    assert layers_ready(loads) == "layers ready 1/4 2/4 | 3/4"
