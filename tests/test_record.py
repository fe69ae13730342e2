"""A benchmark that was cut short goes on where it ended."""

import json
from pathlib import Path

import pytest

from magnetar.benchmarks.clock import QUICK_S, Clock
from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.record import Record

ABOUT = {"date": "2026-01-01", "cpu": "a", "cores": 2, "threads": 2, "quick": False}


def test_what_was_measured_is_found_again_and_what_failed_is_not(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    first = Record(file, ABOUT)
    first.add({"case": "one", "ours": 1.0})
    first.add({"case": "two", "skipped": "failed: no memory"})
    again = Record(file, ABOUT | {"date": "2026-01-02"})
    assert again.results == first.results == {"one": {"case": "one", "ours": 1.0}}
    again.add({"case": "two", "ours": 2.0})
    assert list(Record(file, ABOUT).results) == ["one", "two"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == ABOUT
    assert [line["case"] for line in lines[1:]] == ["one", "two", "two"]


@pytest.mark.parametrize("change", [{"cpu": "b"}, {"threads": 1}, {"quick": True}])
def test_results_of_another_machine_or_kind_are_not_mixed(
    tmp_path: Path, change: dict[str, object]
) -> None:
    Record(tmp_path / "run.jsonl", ABOUT)
    with pytest.raises(ValueError, match="give another file"):
        Record(tmp_path / "run.jsonl", ABOUT | change)


def test_without_a_file_nothing_is_kept_but_the_results() -> None:
    record = Record(None, ABOUT)
    record.add({"case": "one", "ours": 1.0})
    assert list(record.results) == ["one"]


def test_a_quick_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = Clock(4, quick=True)
    assert clock.begin()
    assert clock.case_s() == QUICK_S / 4
    now += QUICK_S * 0.7
    assert clock.begin()
    assert clock.case_s() == pytest.approx(QUICK_S * 0.1)
    now += QUICK_S
    assert not clock.begin()
    assert clock.task(Task(kind="decode", num_tokens=9)).num_tokens == 5


def test_a_whole_run_takes_the_time_it_needs() -> None:
    clock = Clock(1, quick=False)
    assert clock.begin()
    assert clock.task(Task(kind="decode", num_tokens=9)).num_tokens == 9
