"""One client that takes a whole release from one seeder: ours, aria2c, libtorrent as it comes.

They take the same torrent from the same seeder, which offers TCP and uTP, in turns. A transfer
lasts from the connection to the seeder until the client says that it has everything; a run lasts
from the start of the process. Each finds as much memory ready as it fills.
"""

import contextlib
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magnetar.fetcher.torrent.events import PeerConnected
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.session import SessionSettings, TorrentJob, listening_address

from .release import WEIGHTS, Client, write_release
from .row import Row
from .warm_memory import WarmMemory

DEFAULTS_S: Final = 10.0
"""libtorrent's defaults would take a minute for what the others do in seconds."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one client did."""

    transfer_bytes_per_s: float
    bytes_per_s: float


class Seeder:
    """The seeder, in a process of its own; a context manager."""

    def __init__(self, torrent: Path, on_connected: Callable[[], None]) -> None:
        """`on_connected` is called from another thread, as soon as a client connects."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "seed", str(torrent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._on_connected = on_connected
        self._connected_s: queue.SimpleQueue[float] = queue.SimpleQueue()
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._listener = threading.Thread(target=self._listen, name="seeder")
        self._listener.start()

    def connected_s(self) -> float:
        """When the next client connected."""
        return self._connected_s.get(timeout=60)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._on_connected()
            self._connected_s.put(float(line))

    def __enter__(self) -> "Seeder":
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._listener.join()


@contextlib.contextmanager
def tracker(info_hash: str, port: int) -> Iterator[str]:
    """A tracker that knows the seeder; its URL. aria2c takes no address of a peer."""
    command = [sys.executable, "-m", "magnetar.tests.lab.tracker", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/announce"
        about = urllib.parse.urlencode({"info_hash": bytes.fromhex(info_hash), "port": port})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(f"{url}?{about}").read()
        try:
            yield url
        finally:
            process.terminate()


def ours(seeder: Seeder, torrent: Path, into: Path, num_bytes: int) -> Run:
    """Our client."""
    began_s = time.time()
    client = Client(torrent, into, [f"127.0.0.1:{seeder.port}"])
    client.wait_until_checked()
    done_s = client.wait()["done_s"]
    return _run(began_s, seeder.connected_s(), done_s, num_bytes)


def aria2c(url: str) -> Callable[[Seeder, Path, Path, int], Run]:
    """Debian's, in a state as for one download: it writes as it comes and ends when it is done."""

    def run(seeder: Seeder, torrent: Path, into: Path, num_bytes: int) -> Run:
        marker = into / "done"
        hook = into / "hook"
        hook.write_text(f"#!/bin/sh\ntouch {marker}\n")
        hook.chmod(0o755)
        command = ["aria2c", "--quiet", "--seed-time=0", "--file-allocation=none"]
        command += ["--enable-dht=false", "--enable-peer-exchange=false", "--bt-enable-lpd=false"]
        command += ["--interface=127.0.0.1", f"--bt-tracker={url}", f"--dir={into}"]
        command += [f"--on-bt-download-complete={hook}", str(torrent)]
        environment = {name: at for name, at in os.environ.items() if "proxy" not in name.lower()}
        began_s = time.time()
        subprocess.run(command, env=environment, check=True)
        ended_s = time.time()
        run = _run(began_s, seeder.connected_s(), marker.stat().st_mtime, num_bytes)
        return Run(
            transfer_bytes_per_s=run.transfer_bytes_per_s,
            bytes_per_s=num_bytes / (ended_s - began_s),
        )

    return run


def defaults(seeder: Seeder, torrent: Path, into: Path, num_bytes: int) -> Run:
    """A libtorrent session that nobody configured, for a while."""
    command = [sys.executable, "-m", __spec__.name, "fetch", str(torrent), str(into)]
    began_s = time.time()
    told = subprocess.run(
        [*command, str(seeder.port)], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(told)
    return _run(began_s, seeder.connected_s(), found["done_s"], found["done_bytes"])


def _run(began_s: float, connected_s: float, done_s: float, num_bytes: int) -> Run:
    return Run(
        transfer_bytes_per_s=num_bytes / (done_s - connected_s),
        bytes_per_s=num_bytes / (done_s - began_s),
    )


def client_rows(scratch: Path, num_bytes: int, rounds: int) -> Iterator[Row]:
    """Medians of the rounds."""
    raw = write_release(scratch / "release", num_bytes)
    torrent = scratch / "torrent"
    torrent.write_bytes(raw)
    memory = WarmMemory(scratch / "warm", num_bytes * 9 // 8)
    with (
        Seeder(torrent, memory.release) as seeder,
        tracker(parse_metainfo(raw).info_hash, seeder.port) as url,
    ):
        clients = {"ours": ours, "aria2c": aria2c(url), "defaults": defaults}
        found: dict[str, list[Run]] = {name: [] for name in clients}
        for number in range(rounds + 1):
            # Who comes first takes turns, too.
            for name in sorted(clients, reverse=number % 2 == 0):
                # A seeder checks each piece when it first sends it, for whoever comes first; and
                # the defaults are so slow that one run of them is enough.
                if name == "defaults" and number != 1:
                    continue
                with tempfile.TemporaryDirectory(dir=scratch) as into:
                    memory.fill()
                    run = clients[name](seeder, torrent, Path(into), num_bytes)
                    if name != "defaults":
                        _check(scratch / "release" / WEIGHTS, Path(into))
                print(
                    f"{name}: {run.transfer_bytes_per_s / 1e6:.0f} MB/s, with its start and end "
                    f"{run.bytes_per_s / 1e6:.0f} MB/s",
                    file=sys.stderr,
                )
                if number:
                    found[name].append(run)

    def median(name: str, rate: Callable[[Run], float]) -> float:
        return statistics.median(rate(run) / 1e6 for run in found[name])

    for case, reference, rate, goal in (
        ("whole release beside aria2c, MB/s", "aria2c", lambda run: run.transfer_bytes_per_s, 1.0),
        ("the same with start and end", "aria2c", lambda run: run.bytes_per_s, 1.0),
        (
            "whole release beside libtorrent's defaults, MB/s",
            "defaults",
            lambda run: run.transfer_bytes_per_s,
            3.0,
        ),
    ):
        yield Row(
            case=case,
            ours=median("ours", rate),
            reference=median(reference, rate),
            goal=goal,
            is_floor=True,
        )


def _check(original: Path, into: Path) -> None:
    copy = next(into.rglob(WEIGHTS))
    subprocess.run(["cmp", "--silent", str(original), str(copy)], check=True)


def seed(torrent: Path) -> None:
    """Serves the release beside the torrent until standard input closes, and tells who connects."""
    metainfo = parse_metainfo(torrent.read_bytes())
    session = LibtorrentSession(
        SessionSettings(
            listen="127.0.0.1:0", utp=True, dht=False, seeks=False, upload_bytes_per_s=0
        )
    )
    _, port = listening_address(session)
    session.add(
        TorrentJob(
            info_hash=metainfo.info_hash,
            save_path=torrent.parent,
            metainfo=metainfo,
            is_seed=True,
        )
    )
    print(port, flush=True)
    over = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_end, name="end", daemon=True).start()
    while not over.is_set():
        for event in session.poll(0.25):
            if isinstance(event, PeerConnected):
                print(time.time(), flush=True)
    session.close()


def fetch_with_defaults(torrent: Path, into: Path, port: int) -> None:
    """For `DEFAULTS_S`, or until it is done; prints when, and how much there is."""
    import libtorrent

    session = libtorrent.session({"listen_interfaces": "127.0.0.1:0"})
    params = libtorrent.load_torrent_file(str(torrent))
    params.save_path = str(into)
    handle = session.add_torrent(params)
    handle.connect_peer(("127.0.0.1", port))
    end_s = time.time() + DEFAULTS_S
    while not (status := handle.status()).is_seeding and time.time() < end_s:
        time.sleep(0.05)
    print(json.dumps({"done_s": time.time(), "done_bytes": status.total_payload_download}))


def main() -> None:
    """The processes that this module starts."""
    verb, torrent, *more = sys.argv[1:]
    if verb == "seed":
        seed(Path(torrent))
    else:
        fetch_with_defaults(Path(torrent), Path(more[0]), int(more[1]))


def has_aria2c() -> bool:
    """Whether it is installed."""
    return shutil.which("aria2c") is not None


if __name__ == "__main__":
    main()
