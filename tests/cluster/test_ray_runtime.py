"""Ray's surroundings: a private token, explicit addresses, authentication before the import."""

import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.cluster.runtime.process_mark import ProcessMark
from magnetar.cluster.runtime.ray_runtime import joined_ray, token_file
from magnetar.errors import NotFoundError, UsageError


def test_the_token_is_private_and_stays_the_same(tmp_path: Path) -> None:
    path = token_file(tmp_path)
    assert path.stat().st_mode & 0o077 == 0
    assert len(path.read_text()) == 64
    assert token_file(tmp_path).read_text() == path.read_text()
    assert list(path.parent.iterdir()) == [path]


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_authentication_is_on_before_ray_is_imported() -> None:
    found = in_a_fresh_process(
        "import os; [os.environ.pop(n, None) for n in list(os.environ) if n.startswith('RAY_')]\n"
        "from magnetar.cluster.runtime.ray_runtime import prepare_environment\n"
        "prepare_environment()\n"
        "import sys; assert 'ray' not in sys.modules\n"
        "print(os.environ['RAY_AUTH_MODE'], os.path.exists(os.environ['RAY_AUTH_TOKEN_PATH']))"
    )
    assert found == "token True"


def test_a_ray_without_authentication_is_refused() -> None:
    found = in_a_fresh_process(
        "import os; os.environ.pop('RAY_AUTH_MODE', None)\n"
        "import sys, types; sys.modules['ray'] = types.ModuleType('ray')\n"
        "from magnetar.cluster.runtime.ray_runtime import prepare_environment\n"
        "from magnetar.errors import UsageError\n"
        "try: prepare_environment()\n"
        "except UsageError: print('refused')"
    )
    assert found == "refused"


@pytest.mark.parametrize("address", ["auto", "ray://h:1", "h:port", ":1"])
def test_an_address_that_is_none_is_a_usage_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="HOST:PORT"), joined_ray(address):
        pass


def test_an_address_where_nobody_listens_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(NotFoundError, match="no Ray cluster answers"), joined_ray("127.0.0.1:9"):
        pass


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    mark = ProcessMark.of_this_process()
    assert mark.process() is not None
    assert ProcessMark(pid=mark.pid, started=mark.started - 100).process() is None
    assert ProcessMark(pid=2**22 + 1, started=0).process() is None
