"""The socket, the thread, clients that leave, dawdle or stay."""

import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from magnetar.errors import NotFoundError, PortInUseError, UsageError
from magnetar.serve.api.server import Server, bind, is_loopback
from magnetar.tests.api_server import Service, saying, serving
from magnetar.tests.fake_engine import FakeEngine


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll for at most ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.005)


def connected(service: Service) -> socket.socket:
    """A connection to the server, without a client's manners."""
    host, _, port = service.server.address.partition(":")
    return socket.create_connection((host, int(port)))


def test_a_port_in_use_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"Port {port} .*--port 0"):
            bind("127.0.0.1", port)


def test_a_port_that_is_taken_between_bind_and_start_is_named_too() -> None:
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    with bind("127.0.0.1", port) as rival:
        rival.listen()
        server = Server(lambda scope, receive, send: None, bound)  # type: ignore[arg-type, return-value]
        with pytest.raises(PortInUseError, match=f"Port {port}"):
            server.start()
        server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_may_only_connect_with_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="no API key"):
        bind(host, 0)


def test_with_a_key_any_address_will_do() -> None:
    with bind("0.0.0.0", 0, has_api_key=True) as bound:
        assert bound.getsockname()[1] > 0


def test_an_address_of_another_machine_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="Cannot listen"):
        bind("192.0.2.1", 0, has_api_key=True)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_does_not_exist_is_a_usage_error(port: int) -> None:
    with pytest.raises(UsageError, match=str(port)):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)


def test_before_start_clients_are_refused_and_after_stop_again() -> None:
    with serving(saying(" x")) as service:
        url = service.server.url
        assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez", trust_env=False)
    service.server.stop()  # twice does no harm
    assert not [t for t in threading.enumerate() if t.name == "magnetar-http" and t.is_alive()]


def endless() -> FakeEngine:
    """An engine that has much to say and pauses after three tokens."""
    return FakeEngine(reply=lambda prompt, params: [6312] * 400, hold_after=3)


BODY = {"prompt": "a", "max_tokens": 400}


def request_of(body: object) -> bytes:
    """A completion as it goes over the wire."""
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return head % len(raw) + raw


def test_a_client_that_leaves_a_stream_aborts_its_request() -> None:
    with serving(endless()) as service:
        with service.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as s:
            lines = s.iter_lines()
            assert next(lines).startswith("data: ")
        wait_until(lambda: service.engine.num_running == 0)
    assert service.engine.num_aborted == 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_aborts_its_requests(stream: bool, n: int) -> None:
    engine = endless()
    with serving(engine) as service:
        with connected(service) as client:
            client.sendall(request_of({**BODY, "n": n, "stream": stream}))
            wait_until(lambda: len(engine.holds) == n)
        wait_until(lambda: engine.num_running == 0)
    assert engine.num_aborted == n


def test_stop_lets_a_running_answer_end() -> None:
    engine = endless()
    with serving(engine) as service:
        with service.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as s:
            lines = s.iter_lines()
            assert next(lines).startswith("data: ")
            wait_until(lambda: bool(engine.holds))
            stopping = threading.Thread(target=service.server.stop, args=(10,))
            stopping.start()
            engine.release()
            rest = [line for line in lines if line]
        stopping.join()
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def stop_once_it_holds(service: Service) -> threading.Thread:
    """Stop the server with little patience as soon as its engine holds a request."""

    def run() -> None:
        wait_until(lambda: bool(service.engine.holds))
        service.server.stop(drain_s=0.1)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_stop_ends_a_stream_that_takes_too_long_with_an_error() -> None:
    with serving(endless()) as service:
        stopping = stop_once_it_holds(service)
        answer = service.post("completions", {**BODY, "stream": True})
        stopping.join()
    events = answer.text.strip().split("\n\n")
    assert len(events) == 3 + 2
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "stopping"
    assert service.engine.num_aborted == 1


def test_stop_refuses_a_stream_that_has_not_begun() -> None:
    engine = endless()
    engine.hold_after = 0
    with serving(engine) as service:
        stopping = stop_once_it_holds(service)
        answer = service.post("completions", {**BODY, "stream": True})
        stopping.join()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "stopping"


def test_stop_refuses_an_answer_that_takes_too_long() -> None:
    with serving(endless()) as service:
        stopping = stop_once_it_holds(service)
        answer = service.post("completions", BODY)
        stopping.join()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "stopping"
    assert service.engine.num_aborted == 1


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magnetar.serve.api.slow_request_guard.HEADERS_S", 0.3)
    monkeypatch.setattr("magnetar.serve.api.slow_request_guard.BODY_S", 0.3)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "start",
    [b"", b"POST /v1", HEAD, HEAD.replace(b"completions", b"nowhere")],
    ids=["nothing", "headers", "body", "body of a refused request"],
)
def test_a_request_that_drips_in_is_hung_up_on(start: bytes) -> None:
    with serving(saying(" x")) as service, connected(service) as client:
        client.sendall(start)
        client.settimeout(0.02)
        wait_until(lambda: _is_hung_up(client, drip=bool(start)))
    assert service.engine.requests == []


def _is_hung_up(client: socket.socket, *, drip: bool) -> bool:
    try:
        if drip:
            client.sendall(b"x")
        return client.recv(4096) == b""
    except TimeoutError:
        return False
    except (ConnectionResetError, BrokenPipeError):
        return True


@pytest.mark.usefixtures("hasty")
def test_an_answer_may_take_longer_than_a_request() -> None:
    engine = endless()
    with serving(engine) as service:
        timer = threading.Timer(1.0, engine.release)
        timer.start()
        answer = service.post("completions", BODY)
        timer.join()
        again = service.http.get("/livez")
    assert answer.status_code == 200
    assert again.status_code == 200


def test_a_silent_stream_sends_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magnetar.serve.api.sse.HEARTBEAT_S", 0.05)
    engine = endless()
    engine.hold_after = 0
    with serving(engine) as service:
        body = {**BODY, "stream": True}
        with service.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": still working"
            assert next(lines) == ""
            assert next(lines) == ": still working"
            engine.release()
            assert next(line for line in lines if line.startswith("data: "))


def test_a_client_that_stops_reading_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magnetar.serve.api.sse.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("magnetar.serve.api.sse.WRITE_STALL_S", 0.1)
    engine = FakeEngine(reply=lambda prompt, params: [6312] * 10**6)
    with serving(engine, max_context_tokens=2 * 10**6) as service, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(service.server.address.rpartition(":")[2])))
        client.sendall(request_of({"prompt": "a", "max_tokens": 10**6, "stream": True}))
        wait_until(lambda: engine.num_aborted == 1)


@pytest.mark.parametrize(
    "raw",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000],
    ids=["nonsense", "endless header"],
)
def test_what_is_no_request_is_refused_in_openais_shape(raw: bytes) -> None:
    with serving(saying(" x")) as service, connected(service) as client:
        client.sendall(raw)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
