"""A deployment for as long as a command needs it, and what a user can do with it."""

import contextlib
import json
import shlex
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .cluster.spec import DeploymentSpec
from .console import Console
from .errors import UsageError

if TYPE_CHECKING:
    from .serve.launch import Endpoint


@contextlib.contextmanager
def serving(
    spec: DeploymentSpec,
    console: Console,
    stop: threading.Event,
    *,
    ray_address: str | None,
    detach: bool = False,
) -> "Iterator[Endpoint]":
    """Brings a deployment up, says how to talk to it, and closes it at the end."""
    need_importable_package()
    from .serve.launch import up

    endpoint = up(
        spec, ray_address=ray_address, detach=detach, on_progress=console.progress, stop=stop
    )
    with contextlib.closing(endpoint):
        console.event("ready", name=spec.name, url=endpoint.url, model=endpoint.model_name)
        console.data(
            how_to_ask(
                endpoint.url,
                model_name=endpoint.model_name,
                chats=endpoint.chat_format != "none",
                api_key_file=spec.api_key_file,
            )
        )
        yield endpoint


def how_to_ask(url: str, *, model_name: str, chats: bool, api_key_file: str | None) -> str:
    """The URL, a curl line and a Python snippet, to chat or to complete by what the model can."""
    question: dict[str, object]
    if chats:
        route, call, answer = "chat/completions", "chat.completions", "message.content"
        question = {"messages": [{"role": "user", "content": "What is a torrent?"}]}
    else:
        route, call, answer = "completions", "completions", "text"
        question = {"prompt": "A torrent is", "max_tokens": 64}
    body = {"model": model_name, **question}
    headers = ["Content-Type: application/json"]
    key = "'none'"
    curl = ["curl", f"{url}/v1/{route}"]
    for header in headers:
        curl += ["-H", shlex.quote(header)]
    if api_key_file:
        curl += ["-H", f'"Authorization: Bearer $(cat {shlex.quote(api_key_file)})"']
        key = f"open({api_key_file!r}).read().strip()"
    curl += ["-d", shlex.quote(json.dumps(body))]
    arguments = ", ".join(f"{name}={value!r}" for name, value in body.items())
    return f"""\
{url}

  {" ".join(curl)}

  from openai import OpenAI
  client = OpenAI(base_url={f"{url}/v1"!r}, api_key={key})
  reply = client.{call}.create({arguments})
  print(reply.choices[0].{answer})
"""


def need_importable_package() -> None:
    """Other processes import the package by its name; `python cli.py` alone does not give it one.

    Raises:
        UsageError: they could not.
    """
    if not any(finder.find_spec("magnetar", None) for finder in sys.meta_path):
        raise UsageError(
            "the processes that this command starts cannot import magnetar: run "
            "`pip install -e .` in the checkout first"
        )
