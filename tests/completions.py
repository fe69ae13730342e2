"""Completions asked of a running server, whole and as streams."""

import json
from typing import Any

import httpx
import pytest

from magnetar.tests.api_server import Service

HELLO = [6312, 28709]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The bodies of a stream that ended as it should."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def ask(service: Service, body: dict[str, Any], *, stream: bool) -> list[dict[str, Any]]:
    """The choices of an answer, whole or put together from a stream."""
    if not stream:
        answer = service.post("completions", body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"])
    answer = service.post("completions", {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    choices: dict[int, dict[str, Any]] = {}
    for event in events_of(answer):
        [part] = event["choices"]
        whole = choices.setdefault(part["index"], part)
        if whole is part:
            continue
        assert whole["finish_reason"] is None, "nothing may follow the end"
        assert "prompt_token_ids" not in part
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        if part["logprobs"] is not None:
            for name, values in part["logprobs"].items():
                whole["logprobs"][name] += values
        if "token_ids" in part:
            whole["token_ids"] += part["token_ids"]
    return [choices[index] for index in sorted(choices)]


STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
