"""The functions of `kernels/`, compiled for this machine when they are first needed.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from ...settings import data_dir

logger = logging.getLogger(__name__)


BF16, INT8, INT4, INT5 = 0, 1, 2, 3
"""Forms of the matrix."""
MOST_CHOSEN = 16
"""Experts of a token, at most."""
_NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni"}
# Without contraction: where the source multiplies and then adds, both round, as torch's sums do.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
_COMPILE_TIMEOUT_S = 120.0


class Matrix(ctypes.Structure):
    """A matrix [n, k] in blocks, which must stay where they are; `kernels.h` says how."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("n", ctypes.c_long),
        ("k", ctypes.c_long),
        ("form", ctypes.c_int),
    )


class Rows(NamedTuple):
    """The compiled functions; tensors and structures are given as addresses."""

    multiply: Callable[[int, int, int, int, int], int]
    """``(matrix, x, y, M, num_threads)``; 0, or 1 for lack of memory."""
    lay_out: Callable[[int, int, int, int, int, int], None]
    """``(form, w, blocks, N, K, num_threads)``"""
    rms_norm: Callable[[int, int, int, int, int, float, int], None]
    """``(x, weight, y, M, K, eps, num_threads)``"""
    gated: Callable[[int, int, int, int, int], None]
    """``(h, y, M, K, num_threads)``"""
    route: Callable[[int, int, int, int, int, int], None]
    """``(logits, M, num, num_chosen, chosen, weights)``"""
    layers: Callable[[int, int, int, int | None, int | None, int | None, int], int]
    """``(parts, num_parts, batch, x, out, scratch, num_threads)``; bytes of scratch."""


class NoCompiledKernelsError(Exception):
    """This machine cannot have them: the message says why."""


@functools.cache
def compiled_rows() -> Rows:
    """The compiled functions.

    The first call on a machine runs the C compiler ($CC, else ``cc``) for a few seconds.

    Raises:
        NoCompiledKernelsError: no processor with AVX512-BF16 and VNNI, no compiler, or one that
            fails.
    """
    processor = _processor()
    if missing := _NEEDED - processor:
        raise NoCompiledKernelsError(f"the processor has no {', '.join(sorted(missing))}")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoCompiledKernelsError("there is no C compiler; install one for faster decoding")
    sources = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))
    # The very OpenMP of torch, for one pool of threads: two would fight for the cores.
    openmp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not openmp.exists():
        raise NoCompiledKernelsError(f"torch was built without {openmp.name}")
    made_from = (
        [source.read_bytes() for source in sources],
        compiler,
        _FLAGS,
        str(openmp),
        sorted(processor),
    )
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    try:
        library = data_dir() / "kernels" / f"rows-{digest}.so"
        if not library.exists():
            _compile(compiler, sources, openmp, library)
        return _functions(ctypes.CDLL(str(library)))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        raise NoCompiledKernelsError(f"{compiler} fails: {said[0] if said else error}") from error
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        raise NoCompiledKernelsError(str(error)) from error


def _functions(library: ctypes.CDLL) -> Rows:
    address, number, count = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    arguments: dict[str, list[type]] = {
        "multiply": [*[address] * 3, number, count],
        "lay_out": [count, *[address] * 2, *[number] * 2, count],
        "rms_norm": [*[address] * 3, *[number] * 2, ctypes.c_float, count],
        "gated": [*[address] * 2, *[number] * 2, count],
        "route": [address, *[number] * 3, *[address] * 2],
        "layers": [address, number, *[address] * 4, count],
    }
    results: dict[str, type] = {"multiply": count, "layers": number}
    functions = {}
    for name, types in arguments.items():
        functions[name] = library[f"magnetar_{name}"]
        functions[name].argtypes = types
        functions[name].restype = results.get(name)
    return Rows(**functions)


def _processor() -> set[str]:
    """What the processor can do, as the kernel of the system says."""
    if platform.machine() != "x86_64":
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _compile(compiler: str, sources: Sequence[Path], openmp: Path, library: Path) -> None:
    """Appears whole or not at all: several stages may do it at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = {
            source: str(Path(folder, f"{source.stem}.o"))
            for source in sources
            if source.suffix == ".c"
        }
        whole = str(Path(folder, "rows.so"))

        def run(*arguments: str) -> None:
            subprocess.run(
                [compiler, *arguments],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
            )

        with ThreadPoolExecutor(thread_name_prefix="compile") as pool:
            list(pool.map(lambda c: run(*_FLAGS, "-c", str(c), "-o", objects[c]), objects))
        # Without -fopenmp, which would link the compiler's own.
        run("-shared", *objects.values(), str(openmp), "-o", whole)
        os.replace(whole, library)
    logger.info("compiled %s", library)
