"""Times how long the demo is away when a stage of its only pipeline is killed.

    python benchmarks/restarts.py            five kills, two stages
    python benchmarks/restarts.py --quick    two kills

The command is ``magnetar demo``. While an answer streams, a stage is killed, by turns the first and
the last one. From there to the next new request that is answered is what a new client waits; the
longest pause between two tokens of the stream is what the running one notices, and its text must be
that of an answer nobody disturbed. Beside it: the same deployment from its command to serving, with
everything in the store already. Prints a table on stderr and one JSON object per case on stdout;
nothing is kept unless ``--output FILE`` says where.
"""

import argparse
import json
import statistics
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from magnetar.benchmarks.up import OPENER, PROMPT, Run, fresh_store, machine

NUM_TOKENS = 96
KILL_AFTER_TOKENS = 16
POLL_S = 0.02
GOAL = 0.75
"""Of a new start: Ray, the gateway, the plan and the hashes are there still, the rest is not."""


@dataclass
class Answer:
    """A streamed answer and when each part of it came."""

    url: str
    model: str
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    well_begun: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        with OPENER.open(_request(self.url, self.model, NUM_TOKENS, stream=True)) as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    self.times_s.append(time.monotonic())
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise SystemExit(f"the stream ended: {event['error']['message']}")
                    self.text += event["choices"][0]["text"]
                if len(self.times_s) == KILL_AFTER_TOKENS:
                    self.well_begun.set()

    @property
    def longest_pause_s(self) -> float:
        return max(b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))


def _request(url: str, model: str, num_tokens: int, *, stream: bool) -> urllib.request.Request:
    body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0}
    body |= {"stream": stream, "ignore_eos": True}
    return urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )


def num_restarts(url: str) -> int:
    """How often the pipeline came back so far, as the gateway says."""
    with OPENER.open(f"{url}/metrics") as page:
        for line in page.read().decode().splitlines():
            if line.startswith("magnetar:pipeline_restarts_total{"):
                return int(line.rpartition(" ")[2])
    raise SystemExit("/metrics does not say how often pipelines came back")


def stage_processes() -> list[psutil.Process]:
    """Of this command's children, in the order in which they began."""
    ours = psutil.Process().children(recursive=True)
    stages = [each for each in ours if "ray::StageActor" in "".join(each.cmdline())]
    return sorted(stages, key=psutil.Process.create_time)


def kill_one(url: str, model: str, which: int) -> tuple[float, Answer]:
    """Seconds until a new request is answered again, and the answer that went on."""
    answer = Answer(url, model)
    reader = threading.Thread(target=answer.read, name="reader")
    reader.start()
    if not answer.well_begun.wait(60):
        raise SystemExit("the answer did not begin")
    before = num_restarts(url)
    stage_processes()[which].kill()
    began = time.monotonic()
    while num_restarts(url) == before:  # requests that are asked meanwhile might wait
        time.sleep(POLL_S)
    with OPENER.open(_request(url, model, 1, stream=False)) as answered:
        answered.read()
    seconds = time.monotonic() - began
    reader.join()
    return seconds, answer


def row(case: str, ours: list[float], reference: float, **more: Any) -> dict[str, Any]:
    median = statistics.median(ours)
    return {
        "case": case,
        "ours": round(median, 3),
        "unit": "s",
        "reference": round(reference, 3),
        "ratio": round(median / reference, 3),
        "worst": round(max(ours), 3),
        "goal": f"<= {GOAL:g}",
        "holds": median <= GOAL * reference and all(more.values()),
        **more,
    }


def measure(store: Path, *, num_kills: int) -> list[dict[str, Any]]:
    arguments = ["--stages", "2"]
    if not (store / "demo").exists():
        fresh = Run("fresh", store, arguments)
        fresh.until_ready()
        fresh.stop()
    run = Run("again", store, arguments)
    try:
        url, model = run.until_ready()
        up_s = sum(timing.seconds for timing in run.timings)
        undisturbed = Answer(url, model)
        undisturbed.read()
        away, pauses, same = [], [], []
        for number in range(num_kills):
            seconds, answer = kill_one(url, model, -(number % 2))
            away.append(seconds)
            pauses.append(answer.longest_pause_s)
            same.append(answer.text == undisturbed.text)
    finally:
        run.stop()
    return [
        row("from a kill to the next new answer, beside a new start", away, up_s),
        row("pause of the running stream, beside a new start", pauses, up_s, same=all(same)),
    ]


def main() -> None:
    """Kills stages of the demo and says how long that took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two kills")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep the demo's release there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    args = parser.parse_args()
    about = machine() | {"quick": args.quick}
    num_kills = 2 if args.quick else 5
    if args.store:
        rows = measure(args.store, num_kills=num_kills)
    else:
        with fresh_store(None) as store:
            rows = measure(store, num_kills=num_kills)
    for each in rows:
        print(
            f"{each['case']:<56} {each['ours']:7.2f} s (worst {each['worst']:.2f}), "
            f"a new start {each['reference']:.2f} s",
            file=sys.stderr,
        )
    print("\n".join(map(json.dumps, rows)))
    if args.output:
        lines = [json.dumps(each) for each in (about, *rows)]
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
