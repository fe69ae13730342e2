"""The functions of `rows.c`, compiled for this machine when it is first needed.

The library stays in the data folder, under a name that says what it was made from and for.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ...settings import data_dir

logger = logging.getLogger(__name__)


BF16, INT8, INT4 = 0, 1, 2
"""Forms of the matrix."""
_NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_COMPILE_TIMEOUT_S = 120.0


class Rows(NamedTuple):
    """The functions of `rows.c`; tensors are given as addresses."""

    multiply: Callable[[int, int, int, int, int, int, int, int], int]
    """``(form, blocks, x, y, M, N, K, num_threads)``; 0, or 1 for lack of memory."""
    lay_out: Callable[[int, int, int, int, int, int], None]
    """``(form, w, blocks, N, K, num_threads)``"""
    rms_norm: Callable[[int, int, int, int, int, float, int], None]
    """``(x, weight, y, M, K, eps, num_threads)``"""
    gated: Callable[[int, int, int, int, int], None]
    """``(h, y, M, K, num_threads)``"""


class NoCompiledKernelsError(Exception):
    """This machine cannot have them: the message says why."""


@functools.cache
def compiled_rows() -> Rows:
    """The compiled functions.

    The first call on a machine runs the C compiler ($CC, else ``cc``) for about a second.

    Raises:
        NoCompiledKernelsError: no processor with AVX512-BF16, no compiler, or one that fails.
    """
    processor = _processor()
    if missing := _NEEDED - processor:
        raise NoCompiledKernelsError(f"the processor has no {', '.join(sorted(missing))}")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoCompiledKernelsError("there is no C compiler; install one for faster decoding")
    source = Path(__file__).with_name("rows.c")
    # The very OpenMP of torch, for one pool of threads: two would fight for the cores.
    openmp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not openmp.exists():
        raise NoCompiledKernelsError(f"torch was built without {openmp.name}")
    made_from = (source.read_bytes(), compiler, _FLAGS, str(openmp), sorted(processor))
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    try:
        library = data_dir() / "kernels" / f"rows-{digest}.so"
        if not library.exists():
            _compile(compiler, source, openmp, library)
        functions = ctypes.CDLL(str(library))
        multiply, lay_out = functions.magnetar_multiply, functions.magnetar_lay_out
        rms_norm, gated = functions.magnetar_rms_norm, functions.magnetar_gated
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        raise NoCompiledKernelsError(f"{compiler} fails: {said[0] if said else error}") from error
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        raise NoCompiledKernelsError(str(error)) from error
    form, address, number, threads = ctypes.c_int, ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    multiply.argtypes = [form, *[address] * 3, *[number] * 3, threads]
    multiply.restype = ctypes.c_int
    lay_out.argtypes = [form, *[address] * 2, *[number] * 2, threads]
    rms_norm.argtypes = [*[address] * 3, *[number] * 2, ctypes.c_float, threads]
    gated.argtypes = [*[address] * 2, *[number] * 2, threads]
    lay_out.restype = rms_norm.restype = gated.restype = None
    return Rows(multiply=multiply, lay_out=lay_out, rms_norm=rms_norm, gated=gated)


def _processor() -> set[str]:
    """What the processor can do, as the kernel of the system says."""
    if platform.machine() != "x86_64":
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _compile(compiler: str, source: Path, openmp: Path, library: Path) -> None:
    """Appears whole or not at all: several stages may do it at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = [str(Path(folder, name)) for name in ("rows.o", "rows.so")]
        for arguments in (
            [*_FLAGS, "-c", str(source), "-o", made[0]],
            # Without -fopenmp, which would link the compiler's own.
            ["-shared", made[0], str(openmp), "-o", made[1]],
        ):
            subprocess.run(
                [compiler, *arguments],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
            )
        os.replace(made[1], library)
    logger.info("compiled %s", library)
