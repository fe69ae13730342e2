"""A node of the lab: a `NodeAgent` in a process of its own, without Ray, driven over a socket.

``python -m magnetar.tests.lab.node SOCKET HOST ADDRESS STORE`` is what `Node` starts. The socket is
a file, so that it leads out of a network namespace.
"""

import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from .network import Place

_METHODS_AT_ONCE = 4


class Node:
    """The far end of a node process. Calls return futures; `call` waits for them."""

    def __init__(self, place: Place, store: Path) -> None:
        self.place = place
        self.host = place.name
        self._next = 0
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="mglab-")
        path = f"{self._folder.name}/socket"
        with Listener(path, family="AF_UNIX") as listener:
            command = [*place.prefix, sys.executable, "-m", __spec__.name]
            command += [path, place.name, place.lan, str(store)]
            self.process = subprocess.Popen(command)
            self._connection = listener.accept()
        self._reader = threading.Thread(target=self._read, name=f"node-{self.host}", daemon=True)
        self._reader.start()

    def start(self, method: str, *arguments: object) -> "Future[Any]":
        """Calls a method of the agent."""
        future: Future[Any] = Future()
        with self._lock:
            self._next += 1
            self._waiting[self._next] = future
            self._connection.send((self._next, method, arguments))
        return future

    def call(self, method: str, *arguments: object, timeout_s: float = 60.0) -> Any:
        """The same, and waits for its result."""
        return self.start(method, *arguments).result(timeout_s)

    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it in an orderly way, if it still runs."""
        if self.is_alive():
            with self._lock:
                self._connection.send(None)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(10)
        self._connection.close()
        self._folder.cleanup()

    def _read(self) -> None:
        try:
            while True:
                number, is_right, result = self._connection.recv()
                future = self._waiting.pop(number)
                if is_right:
                    future.set_result(result)
                else:
                    future.set_exception(result)
        except (EOFError, OSError):
            for future in self._waiting.values():
                future.set_exception(ConnectionError(f"{self.host} is gone"))


def main(path: str, host: str, address: str, store: str) -> None:
    """Serves calls until it is told to end or its driver is gone."""
    from magnetar.cluster.deployment.agent import NodeAgent

    agent = NodeAgent(host=host, address=address, store=store, shares_lan=True)
    lock = threading.Lock()

    def work(connection: Connection, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = (number, True, getattr(agent, method)(*arguments))
        except Exception as error:  # crosses to the driver, which raises it again
            answer = (number, False, error)
        with lock:
            connection.send(answer)

    with Client(path, family="AF_UNIX") as connection, ThreadPoolExecutor(_METHODS_AT_ONCE) as pool:
        try:
            while (request := connection.recv()) is not None:
                pool.submit(work, connection, *request)
        except EOFError:
            pass
        agent.stop()
        agent.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
