"""A helper of a stage in a process of its own.

``python -m magnetar.tests.helper_process`` reads one JSON object from stdin, says where it listens,
and serves one stage until that hangs up.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch

from magnetar.cluster.links.dial import dial
from magnetar.cluster.links.listener import LinkListener
from magnetar.errors import StageLostError
from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.helper import Helper
from magnetar.serve.engine.helper_link import HelperLink
from magnetar.serve.engine.helper_worker import HelperWorker
from magnetar.tests.fake_stage import SECRET
from magnetar.tests.stages import MemorySource, random_tensors

TIMEOUT_S = 60.0


@contextlib.contextmanager
def helper_process(
    config: ModelConfig,
    experts: Mapping[int, Sequence[int]],
    *,
    dtype: str,
    batch_invariant: bool = False,
    seed: int = 0,
) -> Iterator[tuple[subprocess.Popen[str], HelperLink]]:
    """A process that holds these experts of a model of `random_tensors`, and the link to it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "magnetar.tests.helper_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    wish = {
        "config": asdict(config),
        "experts": [[layer, list(ids)] for layer, ids in experts.items()],
        "dtype": dtype,
        "batch_invariant": batch_invariant,
        "seed": seed,
    }
    try:
        with process.stdin, process.stdout:
            process.stdin.write(json.dumps(wish) + "\n")
            process.stdin.flush()
            address = process.stdout.readline().strip()
            link = dial(address, secret=SECRET, deployment="test", epoch=1, timeout_s=TIMEOUT_S)
            with contextlib.closing(HelperLink(link, name="helper h2 of stage 0")) as helper:
                yield process, helper
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Serve one stage."""
    torch.set_num_threads(1)
    wish = json.loads(sys.stdin.readline())
    config = ModelConfig(**wish["config"])
    source = MemorySource(random_tensors(config, seed=wish["seed"]))
    experts = {layer: tuple(ids) for layer, ids in wish["experts"]}
    helper = Helper.load(
        config=config,
        source=source,
        experts=experts,
        dtype=wish["dtype"],
        device="cpu",
        batch_invariant=wish["batch_invariant"],
    )
    assert all(name.split(".")[3] == "experts" for name in source.names_read)
    listener = LinkListener(host="127.0.0.1", secret=SECRET, deployment="test", epoch=1)
    print(listener.address, flush=True)
    worker = HelperWorker(helper, link=listener.accept(TIMEOUT_S), name="helper h2 of stage 0")
    worker.start()
    with contextlib.suppress(StageLostError):
        worker.wait()
    listener.close()


if __name__ == "__main__":
    main()
