"""A Ray in a process of its own: joined and ended by others, silent on stdout."""

import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from magnetar.cluster.runtime.ray_head import start_head, stop_head
from magnetar.errors import InterruptedByUserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VISITOR = """
import sys
from magnetar.cluster.runtime.ray_runtime import home_node, joined_ray, ray_nodes
with joined_ray(sys.argv[1]):
    import ray

    @ray.remote(num_cpus=0)
    class Dying:
        def pid(self):
            import os
            return os.getpid()

    import os, signal
    dying = Dying.remote()
    os.kill(ray.get(dying.pid.remote()), signal.SIGKILL)  # raylets print about this
    try:
        ray.get(dying.pid.remote())
    except ray.exceptions.RayActorError:
        print(home_node(ray_nodes()).labelled)
"""


def test_others_join_it_until_it_is_stopped(tmp_path: Path) -> None:
    mark, address = start_head(tmp_path / "head", log=tmp_path / "log", stop=threading.Event())
    process = mark.process()
    assert process is not None
    children = process.children(recursive=True)
    try:
        visit = subprocess.run(
            [sys.executable, "-c", VISITOR, address], capture_output=True, text=True, timeout=60
        )
        assert visit.stdout == "True\n", visit.stderr
    finally:
        assert stop_head(mark)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not stop_head(mark)
    assert (tmp_path / "log").read_text() == ""


def test_a_wish_to_stop_ends_the_start(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedByUserError):
        start_head(tmp_path / "head", log=tmp_path / "log", stop=stop)
