"""Imports look down only, and what must be light stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("fetcher", "cluster", "serve", "manifests", "commands")
# What each room may import of the package besides itself.
ALLOWED = {
    "fetcher": {"errors", "settings"},
    "cluster": {"errors", "settings", "fetcher"},
    "serve": {"errors", "settings", "fetcher", "cluster"},
    "manifests": {"errors", "settings", "fetcher", "cluster"},
    "commands": {"__version__", "errors", "settings", "fetcher", "cluster", "serve", "manifests"},
}
# What each room of the cluster may import of the others; what lies beside them is for all.
CLUSTER_ROOMS = {
    "links": set[str](),
    "inventory": {"links"},
    "search": set[str](),
    "planning": {"search"},
    "runtime": {"inventory"},
    "deployment": {"inventory", "planning", "runtime"},
}
HEAVY = ("torch", "ray", "libtorrent", "transformers", "starlette", "uvicorn", "numpy")
LIGHT = (
    "magnetar",
    "magnetar.cli",
    "magnetar.errors",
    "magnetar.settings",
    "magnetar.fetcher.config",
    "magnetar.fetcher.tensors",
    "magnetar.cluster.machines",
    "magnetar.cluster.plan",
    "magnetar.cluster.spec",
    "magnetar.manifests.load",
    "magnetar.serve.engine.step",
)


def imported_parts(file: Path) -> set[str]:
    """Top-level parts of the package that a file imports, relatively or by name."""
    folder = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - (node.level - 1)]
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            found |= {base[0]} if base else set(names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            parts = node.module.split(".")
            if parts[0] == "magnetar":
                found |= set(parts[1:2]) or {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                found |= set(parts[1:2]) if parts[0] == "magnetar" else set()
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_look_down_only(room: str) -> None:
    for file in sorted((ROOT / room).rglob("*.py")):
        surplus = imported_parts(file) - ALLOWED[room] - {room}
        assert not surplus, f"{file.relative_to(ROOT)} imports {', '.join(sorted(surplus))}"


@pytest.mark.parametrize("room", CLUSTER_ROOMS)
def test_rooms_of_the_cluster_look_down_only(room: str) -> None:
    others = CLUSTER_ROOMS.keys() - CLUSTER_ROOMS[room] - {room}
    files = sorted((ROOT / "cluster" / room).glob("*.py"))
    assert len(files) > 2
    for file in files:
        named = re.findall(r"from \.\.(\w+)", file.read_text())
        assert not others & set(named), file.relative_to(ROOT)


def test_errors_and_settings_import_nothing_of_the_package() -> None:
    for name in ("errors.py", "settings.py"):
        assert not imported_parts(ROOT / name)


def test_product_code_never_imports_its_tests() -> None:
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    assert len(files) > 20
    for file in files:
        assert not imported_parts(file) & {"tests", "benchmarks"}, file


def modules_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after ``code``."""
    code += (
        "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(run.stderr.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["--version"]])
def test_help_imports_the_standard_library_alone(arguments: list[str]) -> None:
    # How long an import takes depends on the machine; what is imported does not.
    code = (
        "import contextlib, magnetar.cli\n"
        f"with contextlib.suppress(SystemExit): magnetar.cli.main({arguments})"
    )
    loaded = modules_after(code) - modules_after("pass")
    assert "argparse" in loaded
    assert loaded <= {*sys.stdlib_module_names, "magnetar"}
