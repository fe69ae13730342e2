"""Records on disk: whole or absent, private, and damaged ones are said."""

from pathlib import Path

import pytest

from magnetar.cluster.journal import FileJournal, deployment_record, deployment_records
from magnetar.errors import MagnetarError


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "deep" / "a.json")
    assert journal.read() is None
    journal.write({"epoch": 1})
    journal.write({"epoch": 2})
    assert journal.read() == {"epoch": 2}


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.json")
    journal.write({})
    assert journal.path.stat().st_mode & 0o077 == 0


def test_a_failed_write_leaves_the_old_record_and_no_litter(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.json")
    journal.write({"epoch": 1})
    with pytest.raises(TypeError):
        journal.write({"epoch": object()})
    assert journal.read() == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [journal.path]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(MagnetarError, match="is damaged"):
        FileJournal(path).read()


def test_deployments_are_listed_until_they_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    deployment_record("b").write({"name": "b"})
    deployment_record("a").write({"name": "a"})
    assert [journal.path.stem for journal in deployment_records()] == ["a", "b"]
    deployment_record("a").forget()
    deployment_record("a").forget()
    assert [journal.path.stem for journal in deployment_records()] == ["b"]
