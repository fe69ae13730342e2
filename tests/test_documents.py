"""README, ARCHITECTURE and the decisions say what is there."""

import re
import shlex
from pathlib import Path

import pytest

from magnetar import errors
from magnetar.commands.parser import build_parser
from magnetar.manifests.load import parse_deployment

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "docs/plans.md",
)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a document in one language, continued lines joined."""
    found = re.findall(rf"```{language}\n(.*?)```", text(name), flags=re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands(word: str) -> list[str]:
    return [
        line
        for name in DOCUMENTS
        for block in blocks(name, "bash")
        for line in block.splitlines()
        if line.startswith(word + " ")
    ]


@pytest.mark.parametrize("line", commands("magnetar"))
def test_every_command_in_the_documents_is_one(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    build_parser().parse_args(words[: words.index(">")] if ">" in words else words)


def test_the_documents_show_commands_at_all() -> None:
    assert len(commands("magnetar")) >= 6


@pytest.mark.parametrize("line", commands("make"))
def test_every_make_target_in_the_documents_exists(line: str) -> None:
    targets = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    for target in targets:
        assert re.search(rf"^{target}:", text("Makefile"), flags=re.MULTILINE)


def test_the_readme_manifest_is_valid() -> None:
    (manifest,) = blocks("README.md", "yaml")
    deployment = parse_deployment(manifest.encode(), name="README.md", environment={})
    assert deployment.metadata.name == "mixtral-8x7b"


def test_the_readme_names_every_verb() -> None:
    verbs = set(re.findall(r"`magnetar ([a-z]+)", text("README.md")))
    help_text = build_parser().format_help()
    listed = set(re.findall(r"^    ([a-z]+)  ", help_text, flags=re.MULTILINE))
    assert listed
    assert verbs == listed


def test_the_readme_lists_the_exit_codes_of_the_errors() -> None:
    sentence = text("README.md").partition("Exit codes: ")[2].partition("\n\n")[0]
    codes = {int(code) for code in re.findall(r"\b(\d+) ", sentence + " ")}
    raised = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.MagnetarError)
    }
    assert codes == {0} | raised


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_fit_an_editor(name: str) -> None:
    prose = [line for line in text(name).splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 120] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    base = (ROOT / name).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text(name)):
        assert (base / target).exists(), target


def test_the_map_shows_every_room_and_files_that_exist() -> None:
    architecture = text("ARCHITECTURE.md")
    for folder in ROOT.glob("*/**/__init__.py"):
        room = folder.parent.relative_to(ROOT).as_posix()
        if "." not in room and "build" not in room:
            assert f"`{room}/`" in architecture
    for path in re.findall(
        r"`((?:cli|commands|fetcher|cluster|serve|manifests)[\w/.]*\.py)`", architecture
    ):
        assert (ROOT / path).is_file(), path
