"""What every test stands on: the package by its name, a data folder of its own, fixed examples.

From a bare checkout (nothing installed) the repository root is linked as ``magnetar`` into a
temporary folder that leads both ``sys.path`` and ``PYTHONPATH``, so that subprocesses and the
workers of a Ray started afterwards find the package too.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("magnetar") is None:
    _alias = tempfile.mkdtemp(prefix="magnetar-alias-")
    (Path(_alias) / "magnetar").symlink_to(ROOT, target_is_directory=True)
    sys.path.insert(0, _alias)
    _inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_alias, *([_inherited] if _inherited else [])])
    atexit.register(shutil.rmtree, _alias, ignore_errors=True)

import pytest  # noqa: E402 - after the package has its name
from hypothesis import settings  # noqa: E402

# The same examples on every run, and no deadline: the machine that runs them may be busy.
settings.register_profile("magnetar", derandomize=True, deadline=None, database=None)
settings.load_profile("magnetar")


@pytest.fixture(scope="session", autouse=True)
def _data_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test may read or write the data of whoever runs it, not even through a subprocess.

    Among the folders that pytest clears away, for a run that is killed cannot.
    """
    os.environ["MAGNETAR_HOME"] = str(tmp_path_factory.mktemp("home"))
