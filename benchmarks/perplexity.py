"""Perplexity of a model in bf16, int8 and int4 on English prose, and how near its logits stay.

    python benchmarks/perplexity.py                  the demo's model, made in a temporary folder
    python benchmarks/perplexity.py --release DIR --tokens 16384

The text is Python's own manual as the standard library carries it (``pydoc_data.topics``), cut into
windows that are read from their beginning. Prints one JSON object per dtype on stdout: perplexity,
its ratio to that of bf16, and the cosine between all logits of the text and those of bf16.
"""

import argparse
import json
import math
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from magnetar.benchmarks.up import machine
from magnetar.cluster.machines import ComputeDtype
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.demo.build import build_demo_release
from magnetar.serve.engine.step import StepRow
from magnetar.serve.model.batch import lay_out
from magnetar.serve.model.kv_cache import KVCache
from magnetar.serve.model.loader import COMPUTE_DTYPES, load_transformer
from magnetar.settings import KV_BLOCK_TOKENS

GOALS = {"int8": (1.01, 0.999), "int4": (1.05, 0.99)}
"""Ratio of perplexities at most, cosine at least."""
TOPICS = ("objects", "execmodel", "naming", "exceptions", "class", "function", "import", "try")
CPU = torch.device("cpu")


def main() -> None:
    """Measure every dtype on the same windows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", type=Path, metavar="DIR")
    parser.add_argument("--dtypes", nargs="+", default=["int8", "int4"], metavar="DTYPE")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the results there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        release = arguments.release or build_demo_release(Path(folder, "demo"))
        tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
        text = "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS)
        ids = tokenizer.encode(text).ids[: arguments.tokens]
        windows = [
            ids[start : start + arguments.window]
            for start in range(0, len(ids) - arguments.window + 1, arguments.window)
        ]
        reference = [logits.bfloat16() for logits in window_logits(release, windows, "bf16")]
        expected = perplexity(windows, reference)
        results = [
            {"case": "perplexity bf16", "ours": expected, "tokens": len(windows) * len(windows[0])}
        ]
        print(json.dumps(results[0]), flush=True)
        for dtype in arguments.dtypes:
            began = time.perf_counter()
            logits = [each.bfloat16() for each in window_logits(release, windows, dtype)]
            ours = perplexity(windows, logits)
            most, least = GOALS.get(dtype, (math.inf, 0.0))
            near = cosine(logits, reference)
            results.append(
                {
                    "case": f"perplexity {dtype}",
                    "ours": ours,
                    "ratio": ours / expected,
                    "goal": most,
                    "cosine": near,
                    "cosine_goal": least,
                    "holds": ours / expected <= most and near > least,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
            print(json.dumps(results[-1]), flush=True)
    if arguments.output is not None:
        rows = [machine(), *results]
        arguments.output.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        print(f"kept in {arguments.output}", file=sys.stderr)


@torch.inference_mode()
def window_logits(release: Path, windows: list[list[int]], dtype: str) -> Iterator[torch.Tensor]:
    """Logits [tokens of the window, vocabulary] of every token, one window after the other."""
    facts = read_release(FolderReader(release), given=ReleaseHints(), known=ReleaseHints())
    compute_dtype = COMPUTE_DTYPES[dtype]
    model, _ = load_transformer(
        facts.config,
        FileTensorSource(release, facts.index),
        first_layer=0,
        end_layer=facts.config.n_layers,
        has_embeddings=True,
        has_output=True,
        dtype=cast(ComputeDtype, dtype),
        device=CPU,
    )
    table = range(-(-max(map(len, windows)) // KV_BLOCK_TOKENS))
    caches = {
        layer_id: KVCache(facts.config, num_blocks=len(table), dtype=compute_dtype, device=CPU)
        for layer_id in model.layers
    }
    for ids in windows:
        row = StepRow(
            request_id=0, position=0, token_ids=tuple(ids), new_block_ids=(), sampling=None
        )
        batch = lay_out([row], {0: table}, config=facts.config, dtype=compute_dtype, device=CPU)
        yield model.logits(model.forward(model.embed(torch.tensor(ids)), batch, caches))


def perplexity(windows: list[list[int]], logits: list[torch.Tensor]) -> float:
    """Of every token after the first of its window."""
    losses = [
        F.cross_entropy(each[:-1].float(), torch.tensor(ids[1:]), reduction="sum").item()
        for ids, each in zip(windows, logits, strict=True)
    ]
    return math.exp(sum(losses) / sum(len(ids) - 1 for ids in windows))


def cosine(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Between all logits of all windows, as one vector."""
    product = ours = theirs = 0.0
    for each, expected in zip(logits, reference, strict=True):
        product += (each.float() * expected.float()).sum().item()
        ours += each.float().square().sum().item()
        theirs += expected.float().square().sum().item()
    return product / math.sqrt(ours * theirs)


if __name__ == "__main__":
    main()
