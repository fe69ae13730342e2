"""A manifest file becomes a `Deployment`, or one error that lists everything wrong with it."""

from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import ManifestError, NotFoundError
from .environment import expand
from .schema import Deployment
from .suggest import did_you_mean
from .yaml_loader import MAX_BYTES, Document, Mark, Path, Problem, load_yaml

Kind = TypeVar("Kind", bound=BaseModel)
MAX_REPORTED = 20
_WIDTH = 100
_KINDS = {
    "Deployment": "; a deployment is given by -f",
    "Inventory": "; machines to plan with are given by --inventory",
}


def load_deployment(file: FilePath, *, environment: Mapping[str, str]) -> Deployment:
    """Reads a manifest; relative paths in it are left as they are.

    Raises:
        NotFoundError: there is no such file.
        ManifestError: everything that is wrong, as ``file:line:column: path: message`` each with
            its source line and a caret.
    """
    return read_manifest(file, Deployment, environment=environment)


def read_manifest(file: FilePath, model: type[Kind], *, environment: Mapping[str, str]) -> Kind:
    """Reads a file of another kind in the same way; raises the same."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no manifest {file}: check the path") from error
    except OSError as error:
        raise ManifestError(f"{file}: cannot be read ({error.strerror})") from error
    return _parse(raw, model, name=str(file), environment=environment)


def parse_deployment(raw: bytes, *, name: str, environment: Mapping[str, str]) -> Deployment:
    """The same from bytes; ``name`` stands before every error.

    Raises:
        ManifestError: as of `load_deployment`.
    """
    return _parse(raw, Deployment, name=name, environment=environment)


def _parse(raw: bytes, model: type[Kind], *, name: str, environment: Mapping[str, str]) -> Kind:
    document = load_yaml(raw, substitute=lambda text: expand(text, environment))
    if document.problems and not document.values:
        raise ManifestError(_report(document, document.problems, name))
    problems = list(document.problems)
    try:
        parsed = model.model_validate(document.value)
    except ValidationError as error:
        # A value that could not be read is complained about once.
        told = {each.path for each in problems if each.mark == document.values.get(each.path)}
        for details in error.errors(include_url=False):
            if details["type"] == "extra_forbidden" or details["loc"] not in told:
                problems += _problems_of(details, document, model)
    if problems:
        raise ManifestError(_report(document, problems, name))
    return parsed


def _problems_of(
    details: ErrorDetails, document: Document, model: type[BaseModel]
) -> Iterator[Problem]:
    if details["type"] != "values":
        yield _problem_of(details, document, model)
        return
    for at, message in details["ctx"]["found"]:
        path = (*details["loc"], *at)
        yield Problem(_mark_of(path, document), message, path)


def _problem_of(details: ErrorDetails, document: Document, model: type[BaseModel]) -> Problem:
    path: Path = details["loc"]
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        key, known = str(path[-1]), _known_keys(path[:-1], model)
        hint = did_you_mean(key, known) or f"; known here: {', '.join(known)}"
        return Problem(document.keys[path], f"unknown key {key!r}{hint}", path)
    if kind == "missing":
        return Problem(_mark_of(path[:-1], document), "is missing", path)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = f"should be a mapping of keys to values, not {_shown(value)}"
    elif kind == "literal_error":
        expected = details["ctx"]["expected"]
        message = f"{_shown(value)} is not {expected}" + (
            did_you_mean(
                value, [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
            )
            if isinstance(value, str)
            else ""
        )
        if path == ("kind",) and isinstance(value, str):
            message += _KINDS.get(value, "")
    elif kind == "string_pattern_mismatch":
        message = f"{_shown(value)} should be a DNS label: a-z, 0-9 and - inside, at most 63"
    elif kind == "too_short" and isinstance(value, list):
        message = "is empty: it needs an entry"
    elif kind == "value":
        message = details["msg"]
    else:
        message = f"{details['msg'][0].lower()}{details['msg'][1:]}, not {_shown(value)}"
        message = message.removeprefix("input ")
    return Problem(_mark_of(path, document), message, path)


def _mark_of(path: Path, document: Document) -> Mark:
    """Where a value stands, or what holds it; a mapping stands at its key."""
    while path and path not in document.values:
        path = path[:-1]
    value: object = document.value
    for part in path:
        value = value[part]  # type: ignore[index]
    if isinstance(value, dict) and path in document.keys:
        return document.keys[path]
    return document.values.get(path, Mark(0, 0))


def _known_keys(path: Path, model: type[BaseModel]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an entry of a list, whose type the list's field gave
            continue
        fields = {field.alias: field.annotation for field in model.model_fields.values()}
        part_type = fields[str(part)]
        # The entries of a list, or what an optional field may hold.
        inner = [each for each in get_args(part_type) if each is not type(None)]
        part_type = inner[0] if inner else part_type
        assert isinstance(part_type, type)
        assert issubclass(part_type, BaseModel)
        model = part_type
    return [str(field.alias) for field in model.model_fields.values()]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _report(document: Document, problems: list[Problem], name: str) -> str:
    problems = sorted(problems, key=lambda problem: (problem.mark.line, problem.mark.column))
    lines = []
    for problem in problems[:MAX_REPORTED]:
        line, column = problem.mark.line, problem.mark.column
        place = ".".join(map(str, problem.path))
        lines.append(
            f"{name}:{line + 1}:{column + 1}: {f'{place}: ' if place else ''}{problem.message}"
        )
        lines += _excerpt(document.line(line), column)
    if more := len(problems) - MAX_REPORTED:
        lines += [f"and {more} more"] if more > 0 else []
    return "\n".join(lines)


def _excerpt(line: str, column: int) -> list[str]:
    """The source line, cut around the column where it is long, and a caret under the column."""
    start = max(0, column - _WIDTH // 2) if len(line) > _WIDTH else 0
    shown = "".join(
        character if character.isprintable() else " " for character in line[start : start + _WIDTH]
    )
    if not shown.strip():
        return []
    return [f"    {shown.rstrip()}", f"    {' ' * (column - start)}^"]
