"""The side of a peer: a process that holds one model and measures what it is told to.

Lines of JSON go both ways. The first that comes out says what was loaded; then each line that
comes in is a `Task`, answered by its seconds. Needs the standard library only, because peers live
in environments of their own.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

PROMPTS = (16, 64, 256)
ANSWERS = (4, 8, 16)
"""Lengths of requests, in tokens."""


@dataclass(frozen=True)
class Request:
    """One of a `load`."""

    arrival_s: float
    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """``decode``: every stream has its prompt and first token; time `num_tokens` more of each.

    ``prefill``: time one prompt of `num_prompt` tokens until its first token is known.
    ``load``: serve `requests`, each from the moment of its arrival on; time all, and of each its
    first token from its arrival on (``first_token_s``).
    """

    kind: str
    num_streams: int = 1
    num_prompt: int = 32
    num_tokens: int = 1
    num_requests: int = 0
    rate: float = 0.0
    """Arrivals a second, in a Poisson process; 0: all are there at the beginning."""
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens, the same for all engines; new ones with every seed."""
        chooser = random.Random(f"{self.seed}/{self.num_streams}/{self.num_prompt}")
        return [
            [chooser.randrange(3, vocab_size) for _ in range(self.num_prompt)]
            for _ in range(self.num_streams)
        ]

    def requests(self, vocab_size: int) -> list["Request"]:
        """Mixed lengths at random moments, the same for all engines."""
        chooser = random.Random(f"{self.seed}/{self.num_requests}")
        clock = random.Random(f"{self.seed}/{self.num_requests}/arrivals")
        arrival_s = 0.0
        requests = []
        for _ in range(self.num_requests):
            if self.rate:
                arrival_s += clock.expovariate(self.rate)
            prompt = [chooser.randrange(3, vocab_size) for _ in range(chooser.choice(PROMPTS))]
            requests.append(Request(arrival_s, prompt, chooser.choice(ANSWERS)))
        return requests

    def line(self) -> str:
        """For the other side."""
        return json.dumps(asdict(self))


def served(requests: list[Request], seconds: float, first_token_s: list[float]) -> dict[str, Any]:
    """The answer to a `load`."""
    num_tokens = sum(request.num_tokens for request in requests)
    return {"seconds": seconds, "num_tokens": num_tokens, "first_token_s": first_token_s}


def serve(versions: dict[str, str], measure: Callable[[Task], dict[str, Any]]) -> None:
    """Answer until the input ends. `measure` returns at least ``seconds``."""
    answers = claim_stdout()
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(Task(**json.loads(line)))), file=answers, flush=True)


_answers: Any = None


def claim_stdout() -> Any:
    """The real stdout, for answers only; what libraries print goes to stderr from now on."""
    global _answers
    if _answers is None:
        _answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    return _answers
