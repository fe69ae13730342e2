"""vLLM's CPU build, driven step by step in this process.

python vllm_runner.py FOLDER --threads 2
"""

import argparse
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

from magnetar.benchmarks.peers.runner import Request, Task, claim_stdout, serve, served

KV_GIB = 1


class Peer:
    """One engine; every task waits until it is idle again."""

    def __init__(self, folder: Path) -> None:
        from vllm import EngineArgs, LLMEngine

        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                dtype="bfloat16",
                max_model_len=8192,
                max_num_seqs=32,
                max_num_batched_tokens=2048,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        )
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._num_requests = 0

    def measure(self, task: Task) -> dict[str, Any]:
        """See `Task`."""
        if task.kind == "load":
            return self._serve(task.requests(self._vocab_size))
        spare = task.num_streams if task.kind == "decode" else 0
        num_tokens = 1 if task.kind == "prefill" else 1 + 2 * task.num_tokens + spare
        counts: dict[str, int] = {}
        began = time.perf_counter()
        for prompt in task.prompts(self._vocab_size):
            counts[self._add(prompt, num_tokens)] = 0
        self._until(counts, 1)
        if task.kind == "prefill":
            return {"seconds": time.perf_counter() - began, "num_tokens": task.num_prompt}
        before, began = dict(counts), time.perf_counter()
        target = max(before.values()) + task.num_tokens
        self._until(counts, target)
        seconds = time.perf_counter() - began
        made = sum(counts.values()) - sum(before.values())
        self._engine.abort_request(list(counts))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return {"seconds": seconds, "num_tokens": made}

    def _add(self, prompt: list[int], num_tokens: int) -> str:
        """A request of so many tokens; its name."""
        from vllm import SamplingParams

        wish = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            min_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        self._num_requests += 1
        name = str(self._num_requests)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, wish)
        return name

    def _serve(self, requests: list[Request]) -> dict[str, Any]:
        numbers: dict[str, int] = {}
        first_token_s = [0.0] * len(requests)
        began = time.perf_counter()
        while len(numbers) < len(requests) or self._engine.has_unfinished_requests():
            now = time.perf_counter() - began
            while len(numbers) < len(requests) and requests[len(numbers)].arrival_s <= now:
                request = requests[len(numbers)]
                numbers[self._add(request.prompt, request.num_tokens)] = len(numbers)
            if not self._engine.has_unfinished_requests():
                time.sleep(requests[len(numbers)].arrival_s - now)
                continue
            for output in self._engine.step():
                number = numbers[output.request_id]
                if not first_token_s[number]:
                    now = time.perf_counter() - began
                    first_token_s[number] = now - requests[number].arrival_s
        return served(requests, time.perf_counter() - began, first_token_s)

    def _until(self, counts: dict[str, int], target: int) -> None:
        """Step until every request has so many tokens, or all it asked for."""
        while self._engine.has_unfinished_requests() and min(counts.values()) < target:
            for output in self._engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)


def main() -> None:
    """Load, then answer tasks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    claim_stdout()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        # Cores are not reserved for anything else: the step runs in this process.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(
            map(str, sorted(os.sched_getaffinity(0))[: args.threads])
        ),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    peer = Peer(args.folder)
    serve({name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}, peer.measure)


if __name__ == "__main__":
    main()
