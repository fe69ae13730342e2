"""Damage that is found while the download is under way is mended without waiting for its end."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.piece_map import ByteRange
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent.mending import Mending
from magnetar.tests.seeder import seeding

WEIGHTS = "consolidated.00.pth"
WEIGHTS_BYTES = 8_000_000
UPLOAD_BYTES_PER_S = 1_000_000
FIRST = ByteRange(WEIGHTS, 0, 100_000)


def test_a_damaged_piece_comes_again_before_the_download_is_over(tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    right = random.Random(0).randbytes(WEIGHTS_BYTES)
    (release / WEIGHTS).write_bytes(right)
    (release / "tokenizer.model").write_bytes(b"t" * 1000)
    (release / "params.json").write_text("{}")

    def ignore(progress: Progress) -> None: ...

    with (
        seeding(release, upload_bytes_per_s=UPLOAD_BYTES_PER_S) as seed,
        Fetch(
            kind="magnet",
            location=seed.magnet,
            store=tmp_path / "store",
            on_progress=ignore,
            stop=threading.Event(),
            timeout_s=30,
        ) as fetch,
        ThreadPoolExecutor(1) as thread,
    ):
        fetch.order([[FIRST]])
        assert not fetch.mend_meanwhile(FIRST)
        download = thread.submit(fetch.download)
        assert fetch.wait([FIRST], 30)
        assert fetch.mend_meanwhile(FIRST)  # There is no damage, and that is soon found.
        weights = fetch.folder() / WEIGHTS
        with weights.open("r+b") as file:
            file.seek(50_000)
            file.write(bytes([right[50_000] ^ 1]))
        assert fetch.mend_meanwhile(FIRST)
        assert weights.read_bytes()[: FIRST.num_bytes] == right[: FIRST.num_bytes]
        assert not download.done()
        download.result(60)
        assert weights.read_bytes() == right
        # A piece or two came twice, and what was under way just then.
        assert fetch.received_bytes <= 1.1 * WEIGHTS_BYTES
        assert not fetch.mend_meanwhile(FIRST)


def test_nobody_waits_for_a_download_that_is_over() -> None:
    mending = Mending()
    assert mending.ask(frozenset({1})) is None
    mending.open()
    ask = mending.ask(frozenset({1}))
    assert ask is not None
    assert not ask.looked.is_set()
    mending.close()
    assert ask.looked.is_set()
    assert not mending.is_asked
    assert mending.take() == []
