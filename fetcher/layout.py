"""Which files of a listing make a release that Magnetar can load; the rest is not downloaded."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import ReleaseError
from .checkpoint.layouts import Layout, missing_parts, parts_of

MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MISTRAL_EXTRAS = ("RELEASE",)
_HUGGINGFACE_EXTRAS = (
    "RELEASE",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The files of a release among those of a listing."""

    kind: Layout
    root: str
    """Folder of the release inside the listing, with a trailing slash; empty at the top."""
    weights: tuple[str, ...]
    """Paths in the listing, like the next two."""
    wanted: tuple[str, ...]
    """Everything that is needed or of use, weights included."""
    surplus: tuple[str, ...]


def select_files(sizes: Mapping[str, int]) -> Selection:
    """Finds the one release in a listing of path -> bytes.

    A release that comes in two layouts is taken as Hugging Face's, whose config.json says more.

    Raises:
        ReleaseError: files are missing, in a layout that cannot be read, or there are several
            releases; the message names them.
    """
    markers = [path for path in sizes if path.rpartition("/")[2] in ("params.json", "config.json")]
    roots = sorted({path.rpartition("/")[0] for path in markers})
    if not roots:
        raise ReleaseError(_no_release(sizes))
    chosen: list[Selection] = []
    problems: list[str] = []
    for folder in roots:
        root = f"{folder}/" if folder else ""
        names = {
            path.removeprefix(root): size
            for path, size in sizes.items()
            if path.startswith(root) and "/" not in path.removeprefix(root)
        }
        outcome = _select_in(names)
        if isinstance(outcome, str):
            problems.append(f"{root}: {outcome}" if root else outcome)
            continue
        kind, weights, wanted = outcome
        full = tuple(sorted(root + name for name in wanted))
        chosen.append(
            Selection(
                kind=kind,
                root=root,
                weights=tuple(sorted(root + name for name in weights)),
                wanted=full,
                surplus=tuple(sorted(set(sizes) - set(full))),
            )
        )
    if len(chosen) > 1:
        names_ = ", ".join(selection.root or "." for selection in chosen)
        raise ReleaseError(f"several releases in one place ({names_}): point at one of them")
    if not chosen:
        raise ReleaseError("; ".join(problems))
    _refuse_absurd(chosen[0], sizes)
    return chosen[0]


_Choice = tuple[Layout, list[str], list[str]]


def _select_in(names: Mapping[str, int]) -> _Choice | str:
    """The files of the release in one folder, or why there is none."""
    problems = []
    for marker, select in (("config.json", _huggingface), ("params.json", _mistral)):
        if marker in names:
            outcome = select(names)
            if not isinstance(outcome, str):
                return outcome
            problems.append(outcome)
    return "; ".join(problems)


def _huggingface(names: Mapping[str, int]) -> _Choice | str:
    shards = {name: match for name in names if (match := _SHARD.fullmatch(name))}
    counts = {int(match[2]) for match in shards.values()}
    if len(counts) > 1:
        return f"weights of several splits: {_listed(shards)}"
    if shards:
        count = counts.pop()
        weights = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if missing := [name for name in weights if name not in names]:
            return f"missing files: {_listed(missing)}"
    elif "model.safetensors" in names:
        weights = ["model.safetensors"]
    else:
        return _no_weights(names, "model.safetensors")
    if "tokenizer.json" not in names and "tokenizer.model" not in names:
        return "missing files: tokenizer.json or tokenizer.model"
    extras = [name for name in _HUGGINGFACE_EXTRAS if name in names]
    return "huggingface", weights, ["config.json", *weights, *extras]


def _mistral(names: Mapping[str, int]) -> _Choice | str:
    if "consolidated.safetensors" in names:
        kind: Layout = "mistral-safetensors"
        weights = ["consolidated.safetensors"]
    elif "consolidated.01.pth" in names:
        return "its weights are split by tensor (consolidated.01.pth), which cannot be read"
    elif "consolidated.00.pth" in names:
        kind = "mistral-pth"
        weights = ["consolidated.00.pth"]
    elif parts := parts_of(names):
        kind, weights = "mistral-pt", parts
        if missing := missing_parts(parts):
            return f"missing files: {_listed(missing)}"
    else:
        return _no_weights(names, "consolidated.00.pth or consolidated.safetensors")
    if "tokenizer.model" not in names:
        with_tekken = " (tekken.json cannot be read)" if "tekken.json" in names else ""
        return f"missing files: tokenizer.model{with_tekken}"
    extras = [name for name in _MISTRAL_EXTRAS if name in names]
    return kind, weights, ["params.json", "tokenizer.model", *weights, *extras]


def _no_weights(names: Iterable[str], needed: str) -> str:
    return _unreadable(names) or f"missing files: {needed}"


def _no_release(sizes: Mapping[str, int]) -> str:
    reason = _unreadable(path.rpartition("/")[2] for path in sizes)
    if reason:
        return reason
    return (
        f"missing files: params.json or config.json; there is only {_listed(sizes)}: "
        "a release has one of them beside its weights and tokenizer"
    )


_FORMATS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: name.endswith(".gguf"), "GGUF (quantised in blocks for llama.cpp)"),
    (lambda name: name.startswith("pytorch_model") and name.endswith(".bin"), "PyTorch .bin"),
    (lambda name: name.endswith((".npz", ".onnx", ".h5", ".msgpack")), "another framework's"),
)


def _unreadable(names: Iterable[str]) -> str:
    """Why the weights there are cannot be read, if there are any of a kind that we know."""
    names = tuple(names)
    for matches, kind in _FORMATS:
        if found := [name for name in names if matches(name)]:
            return (
                f"its weights are in a form that Magnetar does not read, {kind}: {_listed(found)}; "
                "take the original release, with safetensors or consolidated.00.pth (--dtype int4 "
                "holds its weights in as little memory)"
            )
    return ""


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _refuse_absurd(selection: Selection, sizes: Mapping[str, int]) -> None:
    for path in selection.wanted:
        if path in selection.weights:
            limit, low = None, 1
        elif "tokenizer.json" in path or path.endswith(".model"):
            limit, low = MAX_TOKENIZER_BYTES, 1
        else:
            limit, low = MAX_CONFIG_BYTES, 0
        if sizes[path] < low:
            raise ReleaseError(f"{path} is empty: the release is broken")
        if limit is not None and sizes[path] > limit:
            raise ReleaseError(
                f"{path} has {sizes[path]} bytes, more than {limit}: it is no {path}"
            )
