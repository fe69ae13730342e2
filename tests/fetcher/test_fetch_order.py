"""Layers are whole, and can be read, one after the other while the rest is still on its way."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from magnetar.fetcher.checkpoint.arriving import ArrivingTensorSource
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.piece_map import ByteRange, ranges_of
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.tensors import TensorEntry, TensorIndex
from magnetar.tests.seeder import seeding

WEIGHTS = "consolidated.00.pth"
NUM_LAYERS = 8
LAYER_BYTES = 800_000
UPLOAD_BYTES_PER_S = 2_000_000


class Waiting:
    """`Arrivals` by a fetch of the same process."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        assert self._fetch.wait(ranges, 60)

    def mend(self, part: ByteRange) -> None:
        self._fetch.mend(part)


def test_the_first_layer_is_read_long_before_the_last_piece_comes(tmp_path: Path) -> None:
    # The layers lie in the file in another order than that in which they are wanted.
    order = [3, 0, 7, 4, 1, 6, 2, 5]
    entries = {
        f"layers.{layer}.w": TensorEntry(
            name=f"layers.{layer}.w",
            source_name="w",
            file=WEIGHTS,
            offset=at * LAYER_BYTES,
            dtype="bf16",
            shape=(LAYER_BYTES // 2,),
        )
        for at, layer in enumerate(order)
    }
    index = TensorIndex(entries)
    release = tmp_path / "release"
    release.mkdir()
    noise = random.Random(0).randbytes(NUM_LAYERS * LAYER_BYTES)
    (release / WEIGHTS).write_bytes(noise)
    (release / "tokenizer.model").write_bytes(b"t")
    (release / "params.json").write_text("{}")
    arrived: list[int] = []

    def ignore(progress: Progress) -> None: ...

    with (
        seeding(release, upload_bytes_per_s=UPLOAD_BYTES_PER_S) as seed,
        ThreadPoolExecutor(1) as thread,
        Fetch(
            kind="magnet",
            location=seed.magnet,
            store=tmp_path / "store",
            on_progress=ignore,
            stop=threading.Event(),
            timeout_s=30,
        ) as fetch,
    ):
        steps = [index.layer(layer) for layer in range(NUM_LAYERS)]
        fetch.order(map(ranges_of, steps))
        folder = fetch.folder()
        source = ArrivingTensorSource(
            folder, index, steps, Waiting(fetch), checks=fetch.load_checks()
        )
        done = thread.submit(fetch.download)
        for layer in range(NUM_LAYERS):
            tensor = source.read(f"layers.{layer}.w")
            start = entries[f"layers.{layer}.w"].offset
            raw = tensor.view(torch.uint8).numpy().tobytes()
            assert raw == noise[start : start + LAYER_BYTES]
            arrived.append(sum(fetch.wait(ranges_of(step), 0) for step in steps))
            assert not done.done() or layer > NUM_LAYERS // 2
        done.result(30)
    assert arrived[0] < NUM_LAYERS // 2
    assert arrived == sorted(arrived)
    assert arrived[-1] == NUM_LAYERS
