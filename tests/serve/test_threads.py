import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from magnetar.serve.model.threads import end_team

TASKS = Path("/proc/self/task")


def test_prepares_before_torch_and_leaves_what_the_user_has_set() -> None:
    script = """
        import os, sys
        from magnetar.serve.model.threads import prepare_threads
        os.environ["GOMP_SPINCOUNT"] = "7"
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
        prepare_threads()
        assert "torch" not in sys.modules
        assert os.environ["GOMP_SPINCOUNT"] == "7"
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_a_team_that_has_ended_leaves_no_thread_and_comes_back_when_needed() -> None:
    counts: list[int] = []
    values = torch.ones(1 << 20)

    def compute() -> None:
        torch.set_num_threads(3)
        for _ in range(2):
            counts.append(len(list(TASKS.iterdir())))
            assert values.sum() == 1 << 20
            counts.append(len(list(TASKS.iterdir())))
            end_team()

    before = torch.get_num_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    torch.set_num_threads(before)

    alone = counts[0]
    assert counts == [alone, alone + 2, alone, alone + 2]
