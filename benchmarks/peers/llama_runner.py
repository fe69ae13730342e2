"""llama.cpp through llama-cpp-python's own binding of its C API, with greedy sampling in numpy.

python llama_runner.py MODEL.gguf --threads 2 --dtype bf16
"""

import argparse
import ctypes
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

from magnetar.benchmarks.peers.runner import Request, Task, claim_stdout, serve, served

MAX_STREAMS = 32
NUM_CONTEXT = 8192
NUM_BATCH = 512
FILE_TYPES = {"int8": ("q8_0", 7), "int4": ("q4_0", 2)}


def quantised(bf16: Path, dtype: str) -> Path:
    """The file in that width, made from the one in bf16 if it is not there."""
    import llama_cpp

    name, file_type = FILE_TYPES[dtype]
    file = bf16.with_suffix(f".{name}.gguf")
    if not file.exists():
        part = file.with_suffix(".part")
        wish = llama_cpp.llama_model_quantize_default_params()
        wish.ftype = file_type
        wish.nthread = os.cpu_count() or 1
        # Every matrix in the asked width, as ours are.
        wish.pure = True
        if llama_cpp.llama_model_quantize(
            str(bf16).encode(), str(part).encode(), ctypes.byref(wish)
        ):
            raise SystemExit(f"llama.cpp could not quantise {bf16}")
        part.rename(file)
    return file


class Slot:
    """A request of a load that is being answered."""

    def __init__(self, number: int, request: Request) -> None:
        self.number = number
        self.request = request
        self.left = list(request.prompt)
        self.position = 0
        self.token = 0
        self.num_made = 0


class Peer:
    """One model and one context; every task begins with an empty memory."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model_wish = llama_cpp.llama_model_default_params()
        # Not mapped: then weights are laid out for the CPU's kernels where there are such.
        model_wish.use_mmap = False
        self._model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), model_wish)
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {file}")
        wish = llama_cpp.llama_context_default_params()
        wish.n_ctx, wish.n_batch, wish.n_ubatch = NUM_CONTEXT, NUM_BATCH, NUM_BATCH
        wish.n_seq_max, wish.kv_unified = MAX_STREAMS, True
        wish.n_threads = wish.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, wish)
        if not self._context:
            raise SystemExit("llama.cpp could not make a context")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocab))
        self._batch: Any = llama_cpp.llama_batch_init(NUM_BATCH, 0, 1)

    def measure(self, task: Task) -> dict[str, Any]:
        """See `Task`."""
        if task.kind == "load":
            return self._serve(task.requests(self._vocab_size))
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        prompts = task.prompts(self._vocab_size)
        began = time.perf_counter()
        tokens = [self._prefill(prompt, stream) for stream, prompt in enumerate(prompts)]
        if task.kind == "prefill":
            return {"seconds": time.perf_counter() - began, "num_tokens": task.num_prompt}
        began = time.perf_counter()
        for step in range(task.num_tokens):
            position = task.num_prompt + step
            rows = [(token, position, stream, True) for stream, token in enumerate(tokens)]
            tokens = self._decode(rows)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "num_tokens": task.num_tokens * task.num_streams}

    def _prefill(self, prompt: list[int], stream: int) -> int:
        sampled: list[int] = []
        for start in range(0, len(prompt), NUM_BATCH):
            chunk = prompt[start : start + NUM_BATCH]
            end = start + len(chunk)
            sampled = self._decode(
                [
                    (token, position, stream, position == len(prompt) - 1)
                    for token, position in zip(chunk, range(start, end), strict=True)
                ]
            )
        return sampled[0]

    def _serve(self, requests: list[Request]) -> dict[str, Any]:
        """As llama.cpp's own server does: a batch has the next token of every answer, and as much
        of the waiting prompts as there is room for."""
        api = self._api
        memory = api.llama_get_memory(self._context)
        api.llama_memory_clear(memory, True)
        waiting = list(enumerate(requests))
        free = list(range(MAX_STREAMS))
        slots: dict[int, Slot] = {}
        first_token_s = [0.0] * len(requests)
        began = time.perf_counter()
        while waiting or slots:
            now = time.perf_counter() - began
            while waiting and free and waiting[0][1].arrival_s <= now:
                number, request = waiting.pop(0)
                slots[free.pop()] = Slot(number, request)
            if not slots:
                time.sleep(waiting[0][1].arrival_s - now)
                continue
            rows: list[tuple[int, int, int, bool]] = []
            asked: list[int] = []
            for stream, slot in sorted(slots.items(), key=lambda item: bool(item[1].left)):
                tokens = slot.left[: NUM_BATCH - len(rows)] if slot.left else [slot.token]
                del slot.left[: len(tokens)]
                rows += [
                    (token, slot.position + at, stream, False) for at, token in enumerate(tokens)
                ]
                slot.position += len(tokens)
                if tokens and not slot.left:
                    rows[-1] = (*rows[-1][:3], True)
                    asked.append(stream)
            sampled = self._decode(rows)
            now = time.perf_counter() - began
            for stream, token in zip(asked, sampled, strict=True):
                slot = slots[stream]
                if slot.num_made == 0:
                    first_token_s[slot.number] = now - slot.request.arrival_s
                slot.token, slot.num_made = token, slot.num_made + 1
                if slot.num_made == slot.request.num_tokens:
                    api.llama_memory_seq_rm(memory, stream, -1, -1)
                    free.append(stream)
                    del slots[stream]
        return served(requests, time.perf_counter() - began, first_token_s)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Token, position, stream, whether to sample: the most likely next tokens."""
        import numpy

        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, stream, samples) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = stream
            batch.logits[row] = samples
        if self._api.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not decode")
        tokens = []
        for row in [row for row, (*_, samples) in enumerate(rows) if samples]:
            logits = self._api.llama_get_logits_ith(self._context, row)
            values = numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,))
            tokens.append(int(values.argmax()))
        return tokens


def main() -> None:
    """Load, then answer tasks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    claim_stdout()
    file = args.file if args.dtype == "bf16" else quantised(args.file, args.dtype)
    peer = Peer(file, args.threads)
    name = "llama-cpp-python"
    serve({name: importlib.metadata.version(name)}, peer.measure)


if __name__ == "__main__":
    main()
