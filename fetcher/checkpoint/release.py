"""What a release is, read from the few bytes that say so."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from ...errors import NotFoundError, ReleaseError
from ..config import ChatFormat, ModelConfig, ReleaseHints
from ..tensors import RangeReader, StoredDtype, TensorEntry, TensorIndex
from .canonical import canonical_index
from .json_object import parse_json_object
from .layouts import PTH, SAFETENSORS, SHARD, SHARD_INDEX, SINGLE, Layout, detect_layout, parts_of
from .params import MAX_JSON_BYTES, read_config, read_params
from .pth import read_pth
from .safetensors_header import read_safetensors
from .stored_tensor import StoredTensor, some

MAX_SHARD_INDEX_BYTES: Final = 64 << 20
MAX_TEMPLATE_BYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseFacts:
    """Everything that planning, loading and serving need to know about a release."""

    config: ModelConfig
    index: TensorIndex
    chat_format: ChatFormat
    layout: Layout
    dtype: StoredDtype
    """That of most of the bytes."""
    tokenizer_file: str
    """``tokenizer.model`` (sentencepiece) or ``tokenizer.json``."""


def read_release(reader: RangeReader, *, given: ReleaseHints, known: ReleaseHints) -> ReleaseFacts:
    """The facts of a release, from its description and the heads and tails of its weights.

    Facts that `given` has win over the release's files; `known` fills in what the files lack.

    Raises:
        MissingRangeError: bytes that it needs have not arrived; fetch them and call again.
        UsageError: the files lack facts and so do the hints; the message names the flags.
        ReleaseError: files are missing or surplus, malformed (CheckpointError) or disagree.
    """
    files = reader.files()
    layout = detect_layout(files)
    if layout == "huggingface":
        config = read_config(_small_file(reader, "config.json"), given=given, known=known)
        stored: Sequence[StoredTensor] = _read_shards(reader)
    else:
        config = read_params(_small_file(reader, "params.json"), given=given, known=known)
        stored = _read_consolidated(reader, layout)
    index = canonical_index(stored, config)
    tokenizer_file = _tokenizer_file(files, layout)
    return ReleaseFacts(
        config=config,
        index=index,
        chat_format=given.chat_format
        or known.chat_format
        or _detect_chat_format(reader, layout=layout, vocab_size=config.vocab_size),
        layout=layout,
        dtype=_dominant_dtype(index),
        tokenizer_file=tokenizer_file,
    )


def stored_tensors(reader: RangeReader) -> list[StoredTensor]:
    """The tensors as files hold them, whatever the model is. Raises what `read_release` does."""
    layout = detect_layout(reader.files())
    if layout == "huggingface":
        return _read_shards(reader)
    return _read_consolidated(reader, layout)


def _read_consolidated(reader: RangeReader, layout: Layout) -> list[StoredTensor]:
    if layout == "mistral-safetensors":
        return list(read_safetensors(reader, SAFETENSORS))
    files = [PTH] if layout == "mistral-pth" else parts_of(reader.files())
    return [tensor for file in files for tensor in read_pth(reader, file)]


def _small_file(reader: RangeReader, file: str, *, limit: int = MAX_JSON_BYTES) -> bytes:
    size = reader.files()[file]
    if size > limit:
        raise ReleaseError(f"{file} has {size} bytes and at most {limit} are read.")
    return reader.read(file, 0, size)


def _read_shards(reader: RangeReader) -> list[StoredTensor]:
    """The tensors of all shards; their names, their index and they themselves must agree."""
    files = reader.files()
    numbers = {name: match[1] for name in sorted(files) if (match := SHARD.fullmatch(name))}
    shards = list(numbers)
    weight_map = _weight_map(reader) if SHARD_INDEX in files else None
    if SINGLE in files:
        if shards or weight_map:
            raise ReleaseError(
                f"The release holds {SINGLE} and also {some([*shards, SHARD_INDEX])}; which of "
                "them counts is not said: remove one."
            )
        return list(read_safetensors(reader, SINGLE))
    complete = {
        f"model-{number:05d}-of-{count}.safetensors"
        for count in set(numbers.values())
        for number in range(1, int(count) + 1)
    }
    named = sorted(set(weight_map.values()) if weight_map else complete)
    if missing := [shard for shard in named if shard not in files]:
        raise ReleaseError(
            f"{len(missing)} of {len(named)} shards are missing ({some(missing)}); take the whole "
            "release."
        )
    if odd := [shard for shard in named if "/" in shard or not shard.endswith(".safetensors")]:
        raise ReleaseError(f"{SHARD_INDEX} names {some(odd)}, which is no safetensors file.")
    if surplus := sorted(set(shards) - set(named)):
        raise ReleaseError(
            f"{len(surplus)} shards are not in {SHARD_INDEX} ({some(surplus)}); the folder may "
            "hold two releases."
        )
    stored = [tensor for shard in named for tensor in read_safetensors(reader, shard)]
    if weight_map:
        _check_weight_map(weight_map, stored)
    return stored


def _weight_map(reader: RangeReader) -> dict[str, str]:
    raw = _small_file(reader, SHARD_INDEX, limit=MAX_SHARD_INDEX_BYTES)
    weight_map = parse_json_object(raw, what=SHARD_INDEX, error=ReleaseError).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise ReleaseError(f"{SHARD_INDEX} has no weight_map from tensors to shards.")
    return weight_map


def _check_weight_map(weight_map: Mapping[str, str], stored: Sequence[StoredTensor]) -> None:
    held = {(tensor.name, tensor.file) for tensor in stored}
    if elsewhere := sorted(name for name, _ in weight_map.items() - held):
        raise ReleaseError(
            f"{len(elsewhere)} tensors are not in the shard that {SHARD_INDEX} names "
            f"({some(elsewhere)}); take the whole release anew."
        )
    if unlisted := sorted(name for name, _ in held - weight_map.items()):
        raise ReleaseError(
            f"{len(unlisted)} tensors of the shards are not in {SHARD_INDEX} ({some(unlisted)}); "
            "take the whole release anew."
        )


def _tokenizer_file(files: Mapping[str, int], layout: Layout) -> str:
    """Each layout's own first: a tokenizer.json has the added tokens that a .model lacks."""
    candidates = ["tokenizer.model", "tokenizer.json"]
    if layout == "huggingface":
        candidates.reverse()
    for name in candidates:
        if name in files:
            return name
    raise ReleaseError(
        "The release holds neither tokenizer.model nor tokenizer.json; put the model's tokenizer "
        "beside its weights."
    )


def _detect_chat_format(reader: RangeReader, *, layout: Layout, vocab_size: int) -> ChatFormat:
    """The format that the release's chat template writes, going by its tokens; never run.

    A template decides, not the vocabulary: base models often have the tokens of their chat
    versions, and have no template.
    """
    if layout != "huggingface":
        return "none"
    template = _chat_template(reader)
    if "<|im_start|>" in template:
        return "chatml"
    # Llama 2 has the same marks and vocabulary, but puts its system prompt between others.
    if "[INST]" in template and "<<SYS>>" not in template and vocab_size == 32000:
        return "mistral-v1"
    return "none"


def _chat_template(reader: RangeReader) -> str:
    """The text of the chat template, or of all of them; empty without one."""
    files = reader.files()
    if "chat_template.jinja" in files:
        raw = _small_file(reader, "chat_template.jinja", limit=MAX_TEMPLATE_BYTES)
        return raw.decode("utf-8", errors="replace")
    if "tokenizer_config.json" not in files:
        return ""
    raw = _small_file(reader, "tokenizer_config.json", limit=MAX_TEMPLATE_BYTES)
    described = parse_json_object(raw, what="tokenizer_config.json", error=ReleaseError)
    return json.dumps(described.get("chat_template", ""), ensure_ascii=False)


def _dominant_dtype(index: TensorIndex) -> StoredDtype:
    bytes_of: Counter[StoredDtype] = Counter()
    for entry in index:
        bytes_of[entry.dtype] += entry.num_bytes
    return bytes_of.most_common(1)[0][0]


def facts_to_json(facts: ReleaseFacts) -> str:
    """The facts as JSON, for another process; `facts_from_json` gives them back equal."""
    return json.dumps(
        {
            "config": asdict(facts.config),
            "index": [asdict(entry) for entry in facts.index],
            "chat_format": facts.chat_format,
            "layout": facts.layout,
            "dtype": facts.dtype,
            "tokenizer_file": facts.tokenizer_file,
        }
    )


def facts_from_json(text: str) -> ReleaseFacts:
    """The facts that `facts_to_json` wrote.

    Raises:
        ReleaseError: it did not write this.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        entries = [
            TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in found["index"]
        ]
        return ReleaseFacts(
            config=ModelConfig(**found["config"]),
            index=TensorIndex({entry.name: entry for entry in entries}),
            chat_format=cast(ChatFormat, found["chat_format"]),
            layout=cast(Layout, found["layout"]),
            dtype=cast(StoredDtype, found["dtype"]),
            tokenizer_file=found["tokenizer_file"],
        )
    except (ValueError, KeyError, TypeError) as cause:
        raise ReleaseError(
            f"These are not the facts of a release ({type(cause).__name__}: {cause})."
        ) from cause


class FolderReader:
    """A `RangeReader` over a release folder whose files are complete.

    The list of files is that of the moment it is made; hidden files are left out.
    """

    def __init__(self, folder: Path) -> None:
        """List `folder`.

        Raises:
            NotFoundError: there is no such folder.
        """
        if not folder.is_dir():
            raise NotFoundError(f"There is no folder {folder}; give the folder of a release.")
        self._folder = folder
        self._files: dict[str, int] = {}
        for parent, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                # is_file follows links: the snapshots of a Hugging Face cache consist of them.
                if not name.startswith(".") and path.is_file():
                    self._files[path.relative_to(folder).as_posix()] = path.stat().st_size

    def files(self) -> Mapping[str, int]:
        """Every file of the release with its full size in bytes."""
        return self._files

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Exactly those bytes; blocks on the disk.

        Raises:
            ReleaseError: the file does not exist or ends before the range does.
        """
        if file not in self._files:
            raise ReleaseError(f"The release in {self._folder} has no file {file!r}.")
        try:
            with (self._folder / file).open("rb") as opened:
                opened.seek(offset)
                read = opened.read(num_bytes)
        except OSError as cause:
            raise ReleaseError(f"Cannot read {self._folder / file}: {cause.strerror}.") from cause
        if len(read) != num_bytes:
            raise ReleaseError(
                f"{self._folder / file} ends before byte {offset + num_bytes}; verify the release."
            )
        return read
