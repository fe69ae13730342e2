"""Turns are taken one after the other, and nobody waits for the dead."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from magnetar.cluster.deployment import turn as turns
from magnetar.cluster.deployment.turn import turn

RELEASE = "a" * 40


class Store:
    """Ray's, as far as turns need it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def _internal_kv_put(self, key: str, value: str, overwrite: bool = True) -> bool:
        with self._lock:
            was_there = key in self.values
            if overwrite or not was_there:
                self.values[key] = value.encode()
            return was_there

    def _internal_kv_get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def _internal_kv_del(self, key: str) -> int:
        return int(self.values.pop(key, None) is not None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "POLL_S", 0.001)


def test_one_deployment_after_the_other_divides_a_release() -> None:
    store, inside, most = Store(), set[str](), list[int]()

    def divide(name: str) -> None:
        for _ in range(50):
            with turn(RELEASE, name, threading.Event(), store=store):
                inside.add(name)
                most.append(len(inside))
                inside.discard(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(divide, ("one", "two", "three", "four")))
    assert max(most) == 1
    assert len(most) == 200
    assert not store.values


def test_another_release_need_not_wait() -> None:
    store = Store()
    with (
        turn(RELEASE, "one", threading.Event(), store=store),
        turn("b" * 40, "two", threading.Event(), store=store),
    ):
        assert len(store.values) == 2


def test_a_deployment_that_died_in_its_turn_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    store, now_s = Store(), iter(range(0, 1000, 5))
    store._internal_kv_put(f"magnetar/turn/{RELEASE}", "dead")
    with turn(RELEASE, "one", threading.Event(), store=store, clock=lambda: next(now_s)):
        assert list(store.values.values()) == [b"one"]
    assert not store.values
    assert "does not answer" in caplog.text


def test_who_is_stopped_waits_no_longer_and_takes_no_turn() -> None:
    store, stop = Store(), threading.Event()
    store._internal_kv_put(f"magnetar/turn/{RELEASE}", "other")
    stop.set()
    with turn(RELEASE, "one", stop, store=store):
        pass
    assert list(store.values.values()) == [b"other"]
