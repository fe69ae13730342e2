"""What the demo asks of the API, and what it makes of the answer."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from magnetar.commands.demo import QUESTION, ask
from magnetar.errors import MagnetarError


class Api(http.server.BaseHTTPRequestHandler):
    """Answers as it is told and remembers what it was asked."""

    status: ClassVar[int] = 200
    answer: ClassVar[str] = " Paris. "
    asked: ClassVar[list[tuple[str, str | None, dict[str, object]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        reply = json.dumps({"choices": [{"message": {"content": self.answer}}]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[tuple[str, type[Api]]]:
    class Fresh(Api):
        asked: ClassVar[list[tuple[str, str | None, dict[str, object]]]] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh) as server:
        thread = threading.Thread(target=server.serve_forever, name="api")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", Fresh
        finally:
            server.shutdown()
            thread.join()


def test_asks_greedily_and_returns_the_answer(
    api: tuple[str, type[Api]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = api
    # A proxy of the environment is for the internet and not for this machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ask(url, "m") == "Paris."
    ((path, key, body),) = handler.asked
    assert (path, key) == ("/v1/chat/completions", None)
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert body["messages"] == [{"role": "user", "content": QUESTION}]


def test_sends_the_key_of_the_file(api: tuple[str, type[Api]], tmp_path: Path) -> None:
    url, handler = api
    (tmp_path / "key").write_text("secret\n")
    ask(url, "m", api_key_file=str(tmp_path / "key"))
    assert handler.asked[0][1] == "Bearer secret"


def test_nothing_and_errors_are_failures(api: tuple[str, type[Api]]) -> None:
    url, handler = api
    handler.answer = "  "
    with pytest.raises(MagnetarError, match="answered nothing"):
        ask(url, "m")
    handler.status = 503
    with pytest.raises(MagnetarError, match="answered 503"):
        ask(url, "m")


def test_nobody_there_is_a_failure() -> None:
    with pytest.raises(MagnetarError, match="does not answer"):
        ask("http://127.0.0.1:1", "m")
