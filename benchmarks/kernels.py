"""How near every kernel for matrices comes to the read bandwidth of this machine.

    python benchmarks/kernels.py                              4096 x 14336, 1 to 512 rows
    python benchmarks/kernels.py --shape 2048 5632 --rows 1 8 --threads 2

Every round runs a plain read of the matrix's bf16 bytes and then each kernel once, so that all meet
the same load. Several copies of the matrix take turns, or the processor's cache would be measured.
Prints one JSON object per kernel and number of rows on stdout: median milliseconds, gigabytes of
weights as held per second, and the share of the plain read's bandwidth in the same run.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from magnetar.cluster.footprint import form_bytes
from magnetar.cluster.machines import ComputeDtype
from magnetar.serve.model.compiled import NoCompiledKernelsError
from magnetar.serve.model.linear import LINEAR_KERNELS, Linear

FORMS: dict[str, ComputeDtype] = {"int8": "int8", "int4": "int4"}
KERNELS = ["plain", "packed", "rows", "rows-int8", "packed-int4", "rows-int4"]
COPIES_BYTES = 400 << 20


def main() -> None:
    """Time all kernels side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--kernels", nargs="+", default=KERNELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the results there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    num_outputs, num_inputs = arguments.shape
    results = [machine(arguments.shape, arguments.threads)]
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    copies = max(1, COPIES_BYTES // weight_NK.nbytes)
    read = [weight_NK.clone().view(torch.int64) for _ in range(copies)]
    kernels: dict[str, list[Linear]] = {}
    for name in arguments.kernels:
        try:
            made = [LINEAR_KERNELS[name](weight_NK.clone()) for _ in range(copies)]
        except (NoCompiledKernelsError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
        else:
            kernels[name] = made
    for num_rows in arguments.rows:
        x_TK = torch.randn(num_rows, num_inputs, generator=generator).bfloat16()
        seconds: dict[str, list[float]] = {name: [] for name in ("read", *kernels)}
        for turn in range(arguments.rounds if num_rows < 64 else max(3, arguments.rounds // 4)):
            seconds["read"].append(timed(read[turn % copies].sum))
            for name, linears in kernels.items():
                linear = linears[turn % len(linears)]
                seconds[name].append(timed(functools.partial(linear, x_TK)))
        read_s = statistics.median(seconds["read"])
        read_gbps = weight_NK.nbytes / read_s / 1e9
        for name, each in seconds.items():
            median_s = statistics.median(each)
            num_bytes = form_bytes(
                FORMS.get(name.rpartition("-")[2], "bf16"), tuple(weight_NK.shape)
            )
            results.append(
                {
                    "case": name,
                    "rows": num_rows,
                    "ms": round(median_s * 1e3, 3),
                    "least_ms": round(min(each) * 1e3, 3),
                    "gbps": round(num_bytes / median_s / 1e9, 1),
                    "share_of_read": round(num_bytes / median_s / 1e9 / read_gbps, 2),
                    "gflops": round(2 * num_rows * weight_NK.numel() / median_s / 1e9),
                }
            )
            print(json.dumps(results[-1]), flush=True)
    if arguments.output is not None:
        arguments.output.write_text("".join(f"{json.dumps(each)}\n" for each in results))
        print(f"kept in {arguments.output}", file=sys.stderr)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def machine(shape: list[int], num_threads: int) -> dict[str, object]:
    """What the results were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return {
        "case": "machine",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "shape": shape,
        "threads": num_threads,
    }


if __name__ == "__main__":
    main()
