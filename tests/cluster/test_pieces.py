"""Pieces of work: which count, and when enough is enough. Time is simulated."""

import hashlib
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.inventory import pieces
from magnetar.cluster.inventory.own_threads import Waits, apart, busiest, computed_ns
from magnetar.cluster.inventory.pieces import (
    DISTURBED,
    FEWEST,
    LONGEST_S,
    SLICE_S,
    Piece,
    timed_pieces,
    undisturbed_s,
)

SECONDS = st.floats(1e-5, 1.0)


class Machine:
    """Its clock, and how long threads wait in each millisecond of work."""

    def __init__(self, *, waited_share: float) -> None:
        self.now_s = self.waited_s = 0.0
        self.waited_share = waited_share

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def perf_counter(self) -> float:
        return self.now_s

    def work(self, seconds: float = 0.001) -> None:
        self.now_s += seconds
        self.waited_s += self.waited_share * seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(waited_share=0.0)
    monkeypatch.setattr(pieces, "time", found)
    monkeypatch.setattr(Waits, "total_s", lambda _: found.waited_s)
    return found


@given(
    calm=st.lists(SECONDS, min_size=FEWEST, max_size=20),
    disturbed=st.lists(st.tuples(SECONDS, st.floats(1.01 * DISTURBED, 2.0)), max_size=20),
)
def test_pieces_that_waited_do_not_count_where_others_did_not(
    calm: list[float], disturbed: list[tuple[float, float]]
) -> None:
    undisturbed = [Piece(seconds, 0.0) for seconds in calm]
    others = [Piece(seconds, seconds * share) for seconds, share in disturbed]
    found = undisturbed_s([*others, *undisturbed])
    assert found == undisturbed_s(undisturbed)
    assert min(calm) <= found <= max(calm)


def test_where_all_waited_the_quarter_counts_that_waited_least() -> None:
    found = [Piece(1.0 + number, 0.1 * (1 + number) ** 2) for number in range(8)]
    assert undisturbed_s(found) == pytest.approx(1.25)


def test_a_calm_machine_is_measured_for_a_slice(machine: Machine) -> None:
    found = timed_pieces(machine.work, pause_s=0.01)
    assert SLICE_S < machine.now_s < SLICE_S + 0.03
    assert undisturbed_s(found) == pytest.approx(0.001)


def test_a_busy_machine_is_measured_longer_but_not_for_ever(machine: Machine) -> None:
    machine.waited_share = 0.5
    timed_pieces(machine.work, pause_s=0.01)
    assert LONGEST_S < machine.now_s < LONGEST_S + 0.03


def test_long_pieces_end_it_when_there_are_a_few(machine: Machine) -> None:
    assert len(timed_pieces(lambda: machine.work(60.0), pause_s=0.01)) == FEWEST


def test_what_does_not_count_of_a_piece_is_taken_away(machine: Machine) -> None:
    found = timed_pieces(machine.work, pause_s=0.01, less_s=lambda: 0.0004)
    assert undisturbed_s(found) == pytest.approx(0.0006)


needs_linux = pytest.mark.skipif(not computed_ns(), reason="the system does not tell of threads")


@needs_linux
def test_threads_that_compute_are_known_and_kept_apart_for_a_while() -> None:
    allowed = os.sched_getaffinity(0)
    since, enough, done = computed_ns(), threading.Event(), threading.Event()

    def compute() -> None:
        while time.thread_time() < 0.05:
            pass
        enough.set()
        done.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    enough.wait()
    threads = busiest(since, len(allowed))
    assert threads[0] == thread.native_id
    with apart(threads):
        where = [os.sched_getaffinity(thread) for thread in threads[: len(allowed)]]
        if len(threads) == len(allowed):
            assert len(set().union(*where)) == len(allowed)
    assert all(os.sched_getaffinity(thread) == allowed for thread in threads)
    with apart(threads[:1] * (len(allowed) + 1)):  # not one for each processor: they stay free
        assert os.sched_getaffinity(threads[0]) == allowed
    done.set()
    thread.join()


@needs_linux
def test_waiting_for_processors_is_seen() -> None:
    """Two threads that compute on one processor wait for each other."""
    allowed, began, done = os.sched_getaffinity(0), threading.Barrier(3), threading.Event()

    def compute() -> None:
        os.sched_setaffinity(0, {min(allowed)})
        began.wait()
        while not done.is_set():
            hashlib.sha256(bytes(1 << 20))  # without the lock of the interpreter

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    with Waits() as waits:
        began.wait()
        until = time.monotonic() + 60
        while waits.total_s() < 0.01 and time.monotonic() < until:
            done.wait(0.001)
        done.set()
        assert waits.total_s() >= 0.01
    for thread in threads:
        thread.join()
