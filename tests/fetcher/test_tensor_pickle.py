import contextlib
import io
import pickle
import re
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import magnetar
from magnetar.errors import CheckpointError, UnsafePickleError
from magnetar.fetcher.checkpoint.pickle_machine import MAX_OPCODES, PickledStorage, PickledTensor
from magnetar.fetcher.checkpoint.tensor_pickle import MAX_PICKLE_BYTES, read_tensor_pickle


def pickled_by_torch(value: object, **options: Any) -> bytes:
    archive = io.BytesIO()
    torch.save(value, archive, **options)
    with zipfile.ZipFile(archive) as opened:
        return opened.read("archive/data.pkl")


class Touches:
    """Writes a file when a pickle of it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


SMALL = {"a.weight": torch.zeros(3, 4, dtype=torch.bfloat16), "b.weight": torch.zeros(4)}


def test_reads_names_types_shapes_and_strides_in_order() -> None:
    found = read_tensor_pickle(pickled_by_torch(SMALL))

    assert list(found.items()) == [
        ("a.weight", PickledTensor(PickledStorage("0", "bf16", 12), 0, (3, 4), (4, 1))),
        ("b.weight", PickledTensor(PickledStorage("1", "fp32", 4), 0, (4,), (1,))),
    ]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_protocol_that_torch_may_write(protocol: int) -> None:
    found = read_tensor_pickle(pickled_by_torch(SMALL, pickle_protocol=protocol))

    assert found == read_tensor_pickle(pickled_by_torch(SMALL))


def test_reads_the_state_of_a_module_with_its_metadata() -> None:
    module = torch.nn.Linear(2, 3)

    assert list(read_tensor_pickle(pickled_by_torch(module.state_dict()))) == ["weight", "bias"]
    assert list(read_tensor_pickle(pickled_by_torch(OrderedDict(module.named_parameters())))) == [
        "weight",
        "bias",
    ]


def test_sees_that_tensors_share_a_storage() -> None:
    whole = torch.zeros(4, 5)

    found = read_tensor_pickle(pickled_by_torch({"whole": whole, "row": whole[2]}))

    assert found["row"] == PickledTensor(found["whole"].storage, 10, (5,), (1,))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_refuses_a_forbidden_global_and_executes_nothing(tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "touched"

    with pytest.raises(UnsafePickleError):
        read_tensor_pickle(pickle.dumps({"a": Touches(touched)}, protocol))

    assert not touched.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "Counter"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ],
)
def test_names_the_forbidden_global(module: str, name: str) -> None:
    by_lines = f"\x80\x02c{module}\n{name}\n.".encode("latin-1")
    from_stack = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)
    )

    for raw in (by_lines, from_stack + b"\x93."):
        with pytest.raises(UnsafePickleError, match=re.escape(f" {module}.{name},")):
            read_tensor_pickle(raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\x80\x02" + b"N" * (MAX_PICKLE_BYTES - 20) + b"cos\nsystem\n.", id="late"),
        pytest.param(b"\x80\x02N" + b"r\xff\xff\xff\xff" * 490_000 + b".", id="memo at 2**32"),
        pytest.param(b"\x80\x02}" + b")" + b"\x85" * 490_000 + b"Ns.", id="deep key"),
        pytest.param(b"\x80\x02}N" + b"q\x00h\x00\x86" * 150_000 + b"Ns.", id="exponential key"),
        pytest.param(b"\x80\x02" + b"(" * 490_000 + b"t.", id="marks"),
        pytest.param(b"\x80\x04\x8d" + b"\xff" * 8 + b".", id="text of 2**64 bytes"),
        pytest.param(b"\x80\x02X\xff\xff\xff\xff.", id="text of 4 GiB"),
        pytest.param(b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", id="huge number"),
    ],
)
def test_refuses_a_bomb_within_a_second(raw: bytes) -> None:
    began = time.process_time()

    with pytest.raises(CheckpointError):
        read_tensor_pickle(raw)

    assert time.process_time() - began < 1.0


def test_refuses_more_opcodes_or_bytes_than_any_release_needs() -> None:
    with pytest.raises(CheckpointError, match=f"more than {MAX_OPCODES} opcodes"):
        read_tensor_pickle(b"\x80\x02" + b"N" * (MAX_OPCODES + 1))
    with pytest.raises(CheckpointError, match=f"at most {MAX_PICKLE_BYTES}"):
        read_tensor_pickle(b"N" * (MAX_PICKLE_BYTES + 1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"model": {"a": torch.zeros(1)}}, "model: dict"),
        ({"step": 7, "a": torch.zeros(1)}, "1 values that are not tensors"),
        ({1: torch.zeros(1)}, "uses a int as a key"),
    ],
)
def test_refuses_what_is_not_a_flat_dictionary_of_tensors(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tensor_pickle(pickled_by_torch(value))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\x80\x02}", "ends at byte 3"),
        (b"\x80\x02.", "stops with values left over"),
        (b"\x80\x02}}.", "stops with values left over"),
        (b"\x80\x02(}.", "stops with values left over"),
        (b"\x80\x02h\x05.", "recalls value 5"),
        (b"\x80\x02}K\x01Q.", "not a storage"),
        (b"\x80\x02)s.", "takes more than it has"),
        (b"\x80\x02t.", "misses a mark"),
        (b"\x80\x02}(X\x01\x00\x00\x00au.", "key without a value"),
        (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "holds a twice"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"\x80\x09.", "protocol 9"),
        (b"\x80\x02)a.", "takes more than it has"),
        (b"\x80\x02))R.", "builds a tensor from something else"),
    ],
)
def test_refuses_damage(raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tensor_pickle(raw)


def test_escapes_what_a_hostile_name_would_do_to_a_terminal() -> None:
    with pytest.raises(UnsafePickleError) as refused:
        read_tensor_pickle(b"\x80\x02cos\x1b[2J\nsystem\n.")

    assert "\x1b" not in str(refused.value)


def test_nothing_in_the_package_unpickles_with_torch_or_pickle() -> None:
    root = Path(magnetar.__file__).parent
    rooms = ("fetcher", "cluster", "serve", "manifests", "commands")
    sources = [path for room in rooms for path in (root / room).rglob("*.py")]

    assert len(sources) > 20
    for path in sources:
        for call in (r"\btorch\.load\(", r"\bc?[pP]ickle\.(load|loads|Unpickler)\("):
            assert not re.search(call, path.read_text(encoding="utf-8")), path


VALID = pickled_by_torch(SMALL)


@settings(max_examples=300)
@given(st.data())
def test_never_raises_anything_else_on_mutated_bytes(data: st.DataObject) -> None:
    raw = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))

    for mutated in (bytes(raw), bytes(raw[:cut]), bytes(raw[cut:])):
        try:
            found = read_tensor_pickle(mutated)
        except CheckpointError:
            continue
        assert all(isinstance(tensor, PickledTensor) for tensor in found.values())


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_never_raises_anything_else_on_random_opcodes(raw: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        read_tensor_pickle(b"\x80\x02" + raw + b".")
