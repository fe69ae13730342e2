"""transformers, with the best implementation of experts that it has for each task.

python transformers_runner.py FOLDER --threads 2
"""

import argparse
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

from magnetar.benchmarks.peers.runner import Task, claim_stdout, serve

# Not `batched_mm`: it copies the weights of every row's experts, gigabytes for a short prompt.
IMPLEMENTATIONS = ("grouped_mm", "eager")


class Peer:
    """One model; tasks of one kind and size use the implementation that was fastest at first."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self._is_moe = getattr(self.model.config, "num_local_experts", 0) > 0
        self._best: dict[tuple[str, int], str] = {}

    def measure(self, task: Task) -> dict[str, Any]:
        """See `Task`."""
        kind = (task.kind, task.num_streams)
        if self._is_moe and kind not in self._best:
            short = Task(
                kind=task.kind,
                num_streams=task.num_streams,
                num_prompt=min(task.num_prompt, 512),
                num_tokens=2,
            )
            seconds = {}
            for name in IMPLEMENTATIONS:
                self.model.set_experts_implementation(name)
                seconds[name] = self._measure(short)
            self._best[kind] = min(seconds, key=lambda name: seconds[name])
        if self._is_moe:
            self.model.set_experts_implementation(self._best[kind])
        num_tokens = (
            task.num_prompt if task.kind == "prefill" else (task.num_streams * task.num_tokens)
        )
        return {
            "seconds": self._measure(task),
            "num_tokens": num_tokens,
            "experts": self._best.get(kind, "none"),
        }

    def _measure(self, task: Task) -> float:
        import torch
        from transformers import DynamicCache

        tokens = torch.tensor(task.prompts(self.model.config.vocab_size))
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            began = time.perf_counter()
            for step in range(task.num_tokens + 1 if task.kind == "decode" else 1):
                if step == 1:
                    began = time.perf_counter()
                logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - began


def main() -> None:
    """Load, then answer tasks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    claim_stdout()
    import torch

    torch.set_num_threads(args.threads)
    peer = Peer(args.folder)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    serve(versions, peer.measure)


if __name__ == "__main__":
    main()
