"""Which layout the files of a release have, going by their names."""

import logging
import re
from collections.abc import Iterable
from typing import Final, Literal

from ...errors import ReleaseError
from .stored_tensor import some

Layout = Literal["mistral-pth", "mistral-pt", "mistral-safetensors", "huggingface"]
"""``mistral-pt`` is several ``consolidated.0X.pt``, as beside the Hugging Face form of Mixtral."""

PTH: Final = "consolidated.00.pth"
SAFETENSORS: Final = "consolidated.safetensors"
SHARD_INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
SHARD: Final = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")

_PART: Final = re.compile(r"consolidated\.(\d\d)\.pt")
_log = logging.getLogger(__name__)


def parts_of(names: Iterable[str]) -> list[str]:
    """The ``consolidated.00.pt``, ``consolidated.01.pt`` ... among these names, in order."""
    return sorted(name for name in names if _PART.fullmatch(name))


def missing_parts(parts: Iterable[str]) -> list[str]:
    """Those that are skipped among ``consolidated.0X.pt``; whether the last is there, none says."""
    numbers = {int(match[1]) for part in parts if (match := _PART.fullmatch(part))}
    gaps = set(range(max(numbers, default=0))) - numbers
    return [f"consolidated.{number:02}.pt" for number in sorted(gaps)]


def detect_layout(files: Iterable[str]) -> Layout:
    """Which layout the names of the files make.

    Raises:
        ReleaseError: none that is read here, or more than one.
    """
    names = set(files)
    consolidated = sorted(
        name
        for name in names
        if name.startswith("consolidated.") and name.endswith((".pth", ".pt", ".safetensors"))
    )
    shards = bool(names & {SINGLE, SHARD_INDEX}) or any(map(SHARD.fullmatch, names))
    huggingface = shards and "config.json" in names
    if huggingface and consolidated:
        # Mistral's later repositories hold both forms of the same weights; config.json says more.
        _log.warning(
            "The release holds its weights twice; reading the Hugging Face form and ignoring %s.",
            some(consolidated),
        )
    if huggingface:
        return "huggingface"
    if consolidated:
        return _consolidated_layout(consolidated, has_params="params.json" in names)
    if shards:
        raise ReleaseError(
            "The release holds safetensors but no config.json, which describes the model."
        )
    raise ReleaseError(_no_layout(names))


def _consolidated_layout(weights: list[str], *, has_params: bool) -> Layout:
    parts = parts_of(weights)
    layouts: dict[Layout, list[str]] = {
        "mistral-pth": [PTH],
        "mistral-pt": parts,
        "mistral-safetensors": [SAFETENSORS],
    }
    found = [layout for layout, files in layouts.items() if files == weights]
    if not found:
        reason = (
            "weights split by tensor over several .pth are not read"
            if all(name.endswith(".pth") for name in weights)
            else "which of them counts is not said; keep one form"
        )
        raise ReleaseError(f"The release holds {some(weights)}: {reason}.")
    if missing := missing_parts(parts):
        raise ReleaseError(
            f"{len(missing)} parts of the weights are missing ({some(missing)}); take the whole "
            "release."
        )
    if not has_params:
        raise ReleaseError(f"The release holds {some(weights)} but no params.json.")
    return found[0]


def _no_layout(names: set[str]) -> str:
    readable = (
        f"{PTH}, {SAFETENSORS} or consolidated.0X.pt with params.json, or {SINGLE} (or "
        f"{SHARD_INDEX} with its shards) with config.json"
    )
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return (
            f"The release is a GGUF file ({some(gguf)}), whose weights are quantised in blocks for "
            "llama.cpp; Magnetar makes its own from the original: take that (--dtype int4 needs "
            f"as little memory), as {readable}."
        )
    if bins := sorted(name for name in names if name.startswith("pytorch_model")):
        return (
            f"The release holds {some(bins)}; pickled shards are not read. Take the safetensors "
            f"of the same model: {readable}."
        )
    return f"The release holds {some(sorted(names)) or 'no files'}; needed: {readable}."
