"""The other programs of the lab, each in a process of its own: tracker, web seed, worse links."""

import contextlib
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .network import Place


@contextlib.contextmanager
def tracker(place: Place) -> Iterator[str]:
    """The URL of a tracker outside."""
    with _running(place, "tracker", _outside(place)) as port:
        yield f"http://{_outside(place)}:{port}/announce"


@contextlib.contextmanager
def web_seed(place: Place, folder: Path) -> Iterator[str]:
    """The URL below which the files of a folder are served, in ranges."""
    with _running(place, "web_seed", _outside(place), str(folder)) as port:
        yield f"http://{_outside(place)}:{port}/"


@contextlib.contextmanager
def leech(
    place: Place, torrent: bytes, folder: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``HOST:PORT`` of a client outside that takes a torrent from whoever connects.

    Its process prints the seconds that the second half of the bytes took.
    """
    file = folder / "torrent"
    file.write_bytes(torrent)
    with _started(place, "leech", _outside(place), str(file), str(folder)) as (process, port):
        yield f"{_outside(place)}:{port}", process


@dataclass(frozen=True, slots=True)
class Link:
    """A proxy outside that passes connections on."""

    address: str
    """``HOST:PORT`` on which it listens."""
    process: subprocess.Popen[str]

    def freeze(self) -> None:
        """From now on nothing passes, and no connection ends."""
        self.process.send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def link(place: Place, to: str, *, delay_s: float = 0.0, stall_bytes: int = 0) -> Iterator[Link]:
    """A way to ``HOST:PORT`` that leads through a worse network."""
    options = ["--delay-s", str(delay_s), "--stall-bytes", str(stall_bytes)]
    with _started(place, "proxy", _outside(place), to, *options) as (process, port):
        yield Link(f"{_outside(place)}:{port}", process)


def read(place: Place, url: str) -> bytes:
    """What is at a URL, as seen from a place."""
    if not place.prefix:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bytes(answer.read())
    script = "import sys, urllib.request as r; "
    script += "sys.stdout.buffer.write(r.urlopen(sys.argv[1], timeout=10).read())"
    command = [*place.prefix, sys.executable, "-c", script, url]
    return subprocess.run(command, check=True, capture_output=True).stdout


def _outside(place: Place) -> str:
    assert place.wan is not None
    return place.wan


@contextlib.contextmanager
def _running(place: Place, program: str, *arguments: str) -> Iterator[int]:
    """The port that the program prints; it ends with the block."""
    with _started(place, program, *arguments) as (_, port):
        yield port


@contextlib.contextmanager
def _started(
    place: Place, program: str, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [*place.prefix, sys.executable, "-m", f"{__package__}.{program}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{program} ended with {process.wait()}")
            yield process, int(line)
        finally:
            process.kill()
