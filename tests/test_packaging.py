"""The repository root is the package, and the wheel holds that package and nothing else."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import magnetar

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SHIPPED = {"tests", "benchmarks", "build", "dist", "docs", "examples"}


def test_listed_packages_are_the_folders_with_an_init() -> None:
    found = {"magnetar"}
    for file in ROOT.rglob("__init__.py"):
        parts = file.parent.relative_to(ROOT).parts
        if parts and parts[0] not in NOT_SHIPPED and not parts[0].startswith("."):
            found.add(".".join(("magnetar", *parts)))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_no_tests_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_data_file_is_listed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["package-data"]
    shipped = {
        file
        for package, patterns in listed.items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    rooms = ("fetcher", "cluster", "serve", "manifests")
    data = {
        file
        for room in rooms
        for file in (ROOT / room).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert shipped == data | {ROOT / "py.typed"}


def test_version_is_the_same_everywhere() -> None:
    assert magnetar.__version__ == PYPROJECT["project"]["version"]


def test_no_root_module_hides_one_of_the_standard_library() -> None:
    names = {file.stem for file in ROOT.glob("*.py")} | {"cluster", "fetcher", "manifests", "serve"}
    assert not names & set(sys.stdlib_module_names)


def test_root_init_imports_nothing_of_the_package_when_loaded() -> None:
    # pytest imports it a second time under the folder's name.
    assert "from ." not in (ROOT / "__init__.py").read_text()


@pytest.mark.parametrize("command", [["-m", "magnetar.cli"], [str(ROOT / "cli.py")]])
def test_runs_as_a_module_and_as_a_file_from_any_directory(
    command: list[str], tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, *command, "--version"],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout == f"magnetar {magnetar.__version__}\n"


def test_file_in_a_bare_checkout_says_that_an_install_is_needed(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "MAGNETAR_HOME": str(tmp_path)}
    # `-S` leaves site-packages out, and with it an installed magnetar; the path brings the rest.
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path += {packages.split(os.pathsep)!r}; sys.argv = ['cli.py', 'demo'];"
        f"import runpy; runpy.run_path({str(ROOT / 'cli.py')!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2, run.stderr
    assert "pip install -e ." in run.stderr
