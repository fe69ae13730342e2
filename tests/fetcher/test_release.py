import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magnetar.errors import CheckpointError, NotFoundError, ReleaseError, UsageError
from magnetar.fetcher.checkpoint.described import described_release
from magnetar.fetcher.checkpoint.layouts import detect_layout
from magnetar.fetcher.checkpoint.release import (
    FolderReader,
    ReleaseFacts,
    facts_from_json,
    facts_to_json,
    read_release,
)
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.tensors import MissingRangeError
from magnetar.tests.readers import ArrivingReader
from magnetar.tests.releases import (
    HINTS,
    LAYOUTS,
    TORCH_DTYPES,
    Dtype,
    Layout,
    mistral_tensors,
    write_release,
)

NOTHING = ReleaseHints()


def read(folder: Path, *, given: ReleaseHints = NOTHING) -> ReleaseFacts:
    return read_release(FolderReader(folder), given=given, known=HINTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """A tiny MoE release of each layout, to be copied before it is changed."""
    folders: dict[Layout, Path] = {}

    def write(layout: Layout) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout)
            write_release(folders[layout], layout=layout, num_layers=2)
        return folders[layout]

    return write


@pytest.fixture
def copied(written: Callable[[Layout], Path], tmp_path: Path) -> Callable[[Layout], Path]:
    def copy(layout: Layout) -> Path:
        return Path(shutil.copytree(written(layout), tmp_path / layout))

    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("moe", "dtype", "window", "tied"),
    [(True, "bf16", None, False), (False, "fp32", 16, False), (False, "bf16", None, True)],
    ids=["mixtral", "mistral", "tied llama"],
)
def test_every_layout_gives_the_tensors_of_the_model_by_canonical_names(
    tmp_path: Path, layout: Layout, moe: bool, dtype: Dtype, window: int | None, tied: bool
) -> None:
    tied = tied and layout.startswith("huggingface")
    model = write_release(
        tmp_path,
        layout=layout,
        moe=moe,
        dtype=dtype,
        num_layers=2,
        sliding_window=window,
        tie_embeddings=tied,
    )

    facts = read(tmp_path)

    source = FileTensorSource(tmp_path, facts.index)
    expected = mistral_tensors(model)
    assert {entry.name for entry in facts.index} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor.to(TORCH_DTYPES[dtype])), name
    assert facts.layout == ("huggingface" if layout.startswith("huggingface") else layout)
    assert facts.dtype == dtype
    assert facts.config.sliding_window == window
    assert facts.config.tie_embeddings == tied
    assert (facts.config.num_experts, facts.config.num_experts_per_tok) == (
        (8, 2) if moe else (0, 0)
    )
    assert (facts.config.rope_theta, facts.config.max_context_tokens) == (1e6, 512)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_facts_survive_the_way_to_another_process(
    written: Callable[[Layout], Path], layout: Layout
) -> None:
    facts = read(written(layout))

    assert facts_from_json(facts_to_json(facts)) == facts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {"dim": 1}, "index": []}'])
def test_refuses_what_are_not_facts(text: str) -> None:
    with pytest.raises(ReleaseError, match="not the facts of a release"):
        facts_from_json(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_release_that_arrives_piece_by_piece_is_read_before_its_weights(
    written: Callable[[Layout], Path], layout: Layout
) -> None:
    complete = FolderReader(written(layout))
    arriving = ArrivingReader(complete, piece_bytes=16 << 10)

    while True:
        try:
            facts = read_release(arriving, given=NOTHING, known=HINTS)
            break
        except MissingRangeError as missing:
            arriving.fetch(missing)

    assert facts == read(written(layout))
    weights = {name for name in complete.files() if name.endswith((".pth", ".pt", ".safetensors"))}
    pieces_read = sum(file in weights for file, _ in arriving.pieces)
    # Head and tail of each file, each of them two pieces at most.
    assert pieces_read <= 4 * len(weights)
    if len(weights) == 1:
        assert pieces_read < complete.files()[min(weights)] // (16 << 10) // 10


def test_facts_that_nobody_knows_are_named_by_their_flags(
    written: Callable[[Layout], Path],
) -> None:
    with pytest.raises(UsageError, match="--rope-theta, --sliding-window, --max-context"):
        read_release(FolderReader(written("mistral-pth")), given=NOTHING, known=NOTHING)


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}",
    "mistral": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "llama-2": "{{ '[INST] <<SYS>>' + messages[0].content + '<</SYS>>' }}",
    "zephyr": "{{ '<|user|>' + messages[0].content }}",
}


@pytest.mark.parametrize(
    ("template", "vocab_size", "expected"),
    [
        ("chatml", 512, "chatml"),
        ("mistral", 32000, "mistral-v1"),
        ("mistral", 512, "none"),
        ("llama-2", 32000, "none"),
        ("zephyr", 32000, "none"),
        (None, 512, "none"),
    ],
)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_decides_on_the_chat_format(
    tmp_path: Path, template: str | None, vocab_size: int, expected: str, place: str
) -> None:
    write_release(
        tmp_path, layout="huggingface", num_layers=1, vocab_size=vocab_size, tokenizer=False
    )
    # The tokens are in the vocabulary of base models too.
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": ["<|im_start|>"]}')
    if template is not None:
        text = TEMPLATES[template]
        raw = json.dumps({"chat_template": text}) if place.endswith(".json") else text
        (tmp_path / place).write_text(raw)

    assert read(tmp_path).chat_format == expected


def test_the_chat_format_given_wins_over_the_known_and_that_over_the_template(
    written: Callable[[Layout], Path],
) -> None:
    reader = FolderReader(written("huggingface"))
    known = replace(HINTS, chat_format="mistral-v1")

    assert read_release(reader, given=NOTHING, known=HINTS).chat_format == "chatml"
    assert read_release(reader, given=NOTHING, known=known).chat_format == "mistral-v1"
    given = ReleaseHints(chat_format="none")
    assert read_release(reader, given=given, known=known).chat_format == "none"
    assert read(written("mistral-pth")).chat_format == "none"


def test_each_layout_prefers_its_own_tokenizer(copied: Callable[[Layout], Path]) -> None:
    for layout, own in (("mistral-pth", "tokenizer.model"), ("huggingface", "tokenizer.json")):
        folder = copied("mistral-pth" if layout == "mistral-pth" else "huggingface")
        for name in ("tokenizer.model", "tokenizer.json"):
            (folder / name).touch()
        assert read(folder).tokenizer_file == own
        (folder / own).unlink()
        assert read(folder).tokenizer_file != own


@pytest.mark.parametrize(
    ("layout", "missing", "message"),
    [
        ("mistral-pth", "params.json", "consolidated.00.pth but no params.json"),
        ("mistral-pth", "tokenizer.model", "neither tokenizer.model nor tokenizer.json"),
        ("mistral-pth", "consolidated.00.pth", "needed: consolidated.00.pth, consolidated.saf"),
        ("huggingface", "config.json", "no config.json"),
        ("huggingface-sharded", "model-00002-of-", "1 of 10 shards are missing .model-00002-of-00"),
    ],
)
def test_says_which_file_is_missing(
    copied: Callable[[Layout], Path], layout: Layout, missing: str, message: str
) -> None:
    folder = copied(layout)
    next(path for path in folder.iterdir() if path.name.startswith(missing)).unlink()

    with pytest.raises(ReleaseError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.gguf", "README.md"], "is a GGUF file .model.gguf., whose weights are quantised"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "pickled shards are not read"),
        (["params.json", "consolidated.00.pth", "consolidated.safetensors"], "keep one form"),
        (["params.json", "consolidated.00.pt", "consolidated.02.pt"], "missing .consolidated.01"),
        (["params.json", "consolidated.00.pt", "consolidated.00.pth"], "keep one form"),
        (["params.json", "consolidated.00.pth", "consolidated.01.pth"], "split by tensor"),
        (["sub/params.json"], "The release holds sub/params.json; needed"),
        ([], "holds no files"),
    ],
)
def test_says_why_a_folder_is_no_release(names: list[str], message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        detect_layout(dict.fromkeys(names, 1))


def test_takes_the_form_that_says_more_where_a_release_has_both(
    copied: Callable[[Layout], Path],
    written: Callable[[Layout], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copied("huggingface")
    shutil.copytree(written("mistral-safetensors"), folder, dirs_exist_ok=True)

    with caplog.at_level(logging.WARNING):
        assert read(folder).layout == "huggingface"

    assert "ignoring consolidated.safetensors" in caplog.text


def edit_shard_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    described = json.loads(path.read_text())
    change(described["weight_map"])
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("model.norm.weight"), "1 tensors of the shards are not in model"),
        (
            lambda found: found.update({"model.norm.weight": found["lm_head.weight"]}),
            "1 tensors are not in the shard that model.safetensors.index.json names",
        ),
        (lambda found: found.update({"x": found["lm_head.weight"]}), "1 tensors are not in the sh"),
        (lambda found: found.update({"x": "other.safetensors"}), "1 of 11 shards are missing"),
        (lambda found: found.update({"x": "config.json"}), "config.json, which is no safetensors"),
        (lambda found: found.update({"x": 7}), "no weight_map"),
        (lambda found: found.clear(), "no weight_map"),
    ],
)
def test_the_shard_index_and_the_shards_must_agree(
    copied: Callable[[Layout], Path], change: Callable[[dict[str, str]], object], message: str
) -> None:
    folder = copied("huggingface-sharded")
    edit_shard_index(folder, change)

    with pytest.raises(ReleaseError, match=message):
        read(folder)


def test_refuses_surplus_shards(copied: Callable[[Layout], Path]) -> None:
    folder = copied("huggingface-sharded")
    shard = next(folder.glob("model-00001-*"))
    shutil.copy(shard, folder / "model-00001-of-00099.safetensors")
    with pytest.raises(ReleaseError, match=r"1 shards are not in model\.safetensors"):
        read(folder)
    shutil.copy(shard, folder / "model.safetensors")
    with pytest.raises(ReleaseError, match="which of them counts is not said"):
        read(folder)


def test_reads_shards_that_have_no_index(copied: Callable[[Layout], Path]) -> None:
    folder = copied("huggingface-sharded")
    expected = read(folder)
    (folder / "model.safetensors.index.json").unlink()

    assert read(folder) == expected
    next(folder.glob("model-00003-*")).unlink()
    with pytest.raises(ReleaseError, match=r"1 of 10 shards are missing \(model-00003-of-"):
        read(folder)


@pytest.mark.parametrize("layout", ["mistral-pth", "mistral-safetensors", "huggingface"])
def test_refuses_shapes_that_disagree_with_the_description(
    copied: Callable[[Layout], Path], layout: Layout
) -> None:
    folder = copied(layout)
    name, key = ("config.json", "intermediate_size")
    if layout != "huggingface":
        name, key = ("params.json", "hidden_dim")
    described = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**described, key: 100}))

    with pytest.raises(CheckpointError, match="48 shapes disagree"):
        read(folder)


@pytest.mark.parametrize("layout", ["mistral-pth", "mistral-safetensors", "huggingface"])
def test_refuses_a_truncated_weights_file(copied: Callable[[Layout], Path], layout: Layout) -> None:
    folder = copied(layout)
    weights = next(path for path in folder.iterdir() if path.suffix in (".pth", ".safetensors"))
    with weights.open("r+b") as opened:
        opened.truncate(weights.stat().st_size - 1000)

    with pytest.raises(CheckpointError, match="cut off"):
        read(folder)


def test_refuses_descriptions_of_absurd_size(copied: Callable[[Layout], Path]) -> None:
    folder = copied("mistral-pth")
    (folder / "params.json").write_bytes(b" " * (2 << 20))

    with pytest.raises(ReleaseError, match="has 2097152 bytes and at most 1048576 are"):
        read(folder)


def test_a_folder_lists_its_files_but_not_the_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "blobs" / ".cache").mkdir(parents=True)
    for name in ("a", ".b", "blobs/c", "blobs/.cache/d"):
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "link").symlink_to("blobs/c")

    reader = FolderReader(tmp_path)

    assert reader.files() == {"a": 3, "link": 3, "blobs/c": 3}
    assert reader.read("link", 1, 2) == b"23"


def test_a_folder_says_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    reader = FolderReader(tmp_path)

    with pytest.raises(ReleaseError, match=r"no file '\.\./a'"):
        reader.read("../a", 0, 1)
    with pytest.raises(ReleaseError, match="ends before byte 4"):
        reader.read("a", 2, 2)
    (tmp_path / "a").unlink()
    with pytest.raises(ReleaseError, match=r"Cannot read .*No such file"):
        reader.read("a", 0, 1)
    with pytest.raises(NotFoundError, match="There is no folder"):
        FolderReader(tmp_path / "missing")


def test_what_params_describe_is_what_the_weights_hold(written: Callable[[Layout], Path]) -> None:
    folder = written("mistral-safetensors")
    facts = read(folder)
    params = json.loads((folder / "params.json").read_text())
    config, index = described_release(params, "fp32", given=NOTHING, known=HINTS)
    assert config == facts.config
    assert [(e.name, e.shape, e.dtype) for e in index] == [
        (e.name, e.shape, e.dtype) for e in facts.index
    ]
    ends = [entry.offset + entry.num_bytes for entry in index]
    assert [entry.offset for entry in index] == [0, *ends[:-1]]
