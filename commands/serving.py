"""A deployment for as long as a command needs it, and what a user can do with it."""

import contextlib
import json
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cluster.spec import DeploymentSpec
from ..cluster.units import layers_text
from ..errors import UsageError
from ..fetcher.progress import Progress
from .console import Console
from .phases import format_bytes

if TYPE_CHECKING:
    from ..serve.launch import Endpoint


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
    # Nothing reports before Ray is up, which takes seconds.
    where = "starting Ray" if ray_address is None else f"joining Ray at {ray_address}"
    console.progress(Progress(phase="metadata", message=where))
    from ..serve.launch import up

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
    key = "'none'"
    curl = [f"curl {url}/v1/{route}", "  -H 'Content-Type: application/json'"]
    if api_key_file:
        curl.append(f'  -H "Authorization: Bearer $(cat {shlex.quote(api_key_file)})"')
        key = f"open({api_key_file!r}).read().strip()"
    fields = ",\n".join(f"    {json.dumps(name)}: {json.dumps(body[name])}" for name in body)
    curl.append("  -d " + shlex.quote(f"{{\n{fields}\n  }}"))
    arguments = "\n".join(f"    {name}={value!r}," for name, value in body.items())
    line = " \\\n".join(curl)
    # Not indented, so that both can be pasted as they are.
    return f"""\
{url}

{line}

from openai import OpenAI
client = OpenAI(base_url={f"{url}/v1"!r}, api_key={key})
reply = client.{call}.create(
{arguments}
)
print(reply.choices[0].{answer})
"""


def status_table(found: Sequence[Mapping[str, Any]], *, details: bool) -> str:
    """Deployments as aligned lines; with ``details`` their conditions and stages below."""
    rows = [("NAME", "PHASE", "READY", "MODEL", "URL")]
    for told in found:
        ready = "yes" if told["ready"] else "no"
        rows.append(
            (
                str(told["name"]),
                str(told["phase"]),
                ready,
                str(told.get("model_name") or "-"),
                str(told.get("url") or "-"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for told in found:
        if message := told.get("message") or (told.get("failure") or {}).get("message"):
            lines.append(f"{told['name']}: {message}")
        elif told["ready"]:  # what is amiss although it serves
            lines += [
                f"{told['name']}: {each['message']}"
                for each in told.get("conditions") or ()
                if not each["status"]
            ]
        if details:
            lines += [
                f"  {'yes' if each['status'] else 'no ':<3}  {each['type']:<15}  {each['reason']}"
                f"  {_since(each)}{each['message']}".rstrip()
                for each in told.get("conditions") or ()
            ]
            lines += _stage_lines(told)
            lines += _restart_lines(told)
            lines += [
                f"  node {node['host']}: {format_bytes(node['wan_received_bytes'])} from outside, "
                f"{format_bytes(node['lan_received_bytes'])} from nodes, "
                f"{format_bytes(node['lan_sent_bytes'])} to nodes"
                for node in told.get("traffic") or ()
                if node["received_bytes"] or node["sent_bytes"]
            ]
    return "\n".join(lines)


def _since(condition: Mapping[str, Any]) -> str:
    """Of what is amiss, from when on it is."""
    return "" if condition["status"] else f"since {condition['last_transition_time']}: "


def _restart_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Of pipelines that were lost at some time."""
    pipelines = told.get("pipelines") or ()
    for each in pipelines:
        if not each["cause"]:
            continue
        which = f"pipeline {each['number']}" if len(pipelines) > 1 else "the pipeline"
        state = {"up": "up", "waiting": "down", "starting": "being started again"}[each["state"]]
        yield (
            f"  {which}: {state} since {each['since']}, restarts: {each['num_restarts']}, "
            f"failures in a row: {each['num_failures']}, lost by: {each['cause']}"
        )


def _stage_lines(told: Mapping[str, Any]) -> Iterator[str]:
    loaded = {
        (each["pipeline"], each["index"]): each["num_layers"] for each in told.get("loaded") or ()
    }
    pipelines = (told.get("plan") or {}).get("pipelines", ())
    for number, pipeline in enumerate(pipelines):
        which = f"pipeline {number}, " * (len(pipelines) > 1)
        for stage in pipeline["stages"]:
            ready = loaded.get((number, stage["index"]))
            yield (
                f"  {which}stage {stage['index']}:"
                f" {layers_text(stage['first_layer'], stage['end_layer'])}"
                f" on {stage['host']} ({stage['device']}, {stage['dtype']})"
                + (f", {ready} ready" if ready is not None else "")
            )


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
