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


@dataclass(frozen=True, kw_only=True)
class Task:
    """``decode``: every stream has its prompt and first token; time `num_tokens` more of each.

    ``prefill``: time one prompt of `num_prompt` tokens until its first token is known.
    """

    kind: str
    num_streams: int = 1
    num_prompt: int = 32
    num_tokens: int = 1
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens, the same for all engines; new ones with every seed."""
        chooser = random.Random(f"{self.seed}/{self.num_streams}/{self.num_prompt}")
        return [
            [chooser.randrange(3, vocab_size) for _ in range(self.num_prompt)]
            for _ in range(self.num_streams)
        ]

    def line(self) -> str:
        """For the other side."""
        return json.dumps(asdict(self))


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
