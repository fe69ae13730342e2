"""The threads that compute a step, and how they wait for each other.

They are OpenMP's, shared by torch and the compiled kernels. Every thread that computes gets a team
of its own, whose idle threads spin for a moment before they sleep.
"""

import contextlib
import ctypes
import os
from pathlib import Path

_SPIN_COUNT = "1000"
"""Some 15 us, by estimate. By itself OpenMP would take 300 times as many. Beside one busy process a
token of the demo's model then took 32 to 130 ms (medians of five rounds), and 33 to 34 with these;
on idle cores it took 11.9 and 12.1 (medians of the rounds), each layer being two calls. Besides,
the idle threads of a stage would keep those of the next one from their cores. With 0 threads would
wake up at every barrier."""
_PAUSE_SOFT = 1


def prepare_threads() -> None:
    """Set what torch and OpenMP read when they are loaded; what the user has set remains."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    # Weights in huge pages, where the system gives them to those who ask: decoding 1 and 8 streams
    # on two busy cores was 11 and 7 % faster (medians of five).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def end_team() -> None:
    """End the threads that helped the calling one, because another will compute from now on.

    While a process has more of them than cores, asleep or not, none ever spins: a token of the
    demo's model took 1.25 times as long, as threads were woken hundreds of times for it.
    """
    import torch

    openmp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    with contextlib.suppress(OSError, AttributeError):  # another OpenMP, or one older than 5.0
        ctypes.CDLL(str(openmp)).omp_pause_resource_all(_PAUSE_SOFT)
