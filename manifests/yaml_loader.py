"""YAML with positions and without traps: text in, plain values and where each stands out.

PyYAML's own loader expands a 422-byte merge bomb for 1.9 s, lets duplicate keys pass and reads
``no`` as False, ``1:30`` as 90 and ``012`` as 10. This one composes the same nodes and refuses
anchors, aliases, merge keys, tags, duplicate keys, further documents and anything too large, and
resolves scalars as YAML 1.2 does. The C loader is never used: it crashes on deep nesting.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml
from yaml.composer import Composer
from yaml.events import AliasEvent, NodeEvent
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what PyYAML counts as one

Scalar: TypeAlias = str | int | float | bool | None
Value: TypeAlias = "Scalar | list[Value] | dict[str, Value]"
Path: TypeAlias = tuple[str | int, ...]
Substitute: TypeAlias = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the text; lines and columns count from 0."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    mark: Mark
    message: str
    path: Path = ()


@dataclass(slots=True)
class Document:
    """A parsed text. ``value`` is what could be read even where there are problems."""

    text: str
    value: Value = None
    keys: dict[Path, Mark] = field(default_factory=dict)
    """Where the key of a mapping entry stands, by the path of its value."""
    values: dict[Path, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, number: int) -> str:
        """A line of the text, counted as the marks count."""
        lines = _LINE_BREAK.split(self.text)
        return lines[number] if number < len(lines) else ""


class _Stop(Exception):
    """Something after which reading on makes no sense."""

    def __init__(self, mark: Mark, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(mark, message)


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's pure composer with a budget; it notes anchors and refuses aliases."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.problems: list[Problem] = []
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = _mark(event.start_mark)
        if isinstance(event, AliasEvent):
            raise _Stop(
                mark, f"aliases are not allowed: write the value in place of *{event.anchor}"
            )
        if isinstance(event, NodeEvent) and event.anchor is not None:
            self.problems.append(Problem(mark, f"anchors are not allowed: remove &{event.anchor}"))
            event.anchor = None
        if getattr(event, "tag", None) is not None:
            self.problems.append(Problem(mark, f"tags are not allowed: remove {event.tag}"))
            event.tag = None
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _Stop(mark, f"more than {MAX_NODES} values: this is no manifest")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Stop(mark, f"nested deeper than {MAX_DEPTH} levels: this is no manifest")
        try:
            return super().compose_node(parent, index)  # type: ignore[arg-type]
        finally:
            self._depth -= 1


def load_yaml(raw: bytes, *, substitute: Substitute | None = None) -> Document:
    """Reads one YAML document of at most ``MAX_BYTES``; never raises.

    ``substitute`` sees the text of every scalar value (never of a key) before its type is
    resolved and raises `ValueError` to complain; what it returns stays one scalar.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8", errors="replace")
        before = raw[: error.start].decode("utf-8", errors="replace")
        return Document(
            text, problems=[Problem(_end_of(before), "not UTF-8 text: save it as UTF-8")]
        )
    document = Document(text)
    if len(raw) > MAX_BYTES:
        message = f"{len(raw)} bytes are too many for a manifest; at most {MAX_BYTES} are read"
        document.problems.append(Problem(Mark(0, 0), message))
        return document
    try:
        composer = _Composer(text)
        document.problems = composer.problems
        node = composer.get_single_node()
    except _Stop as stop:
        document.problems.append(stop.problem)
    except ReaderError as error:
        message = f"character {chr(error.character)!r} is not allowed: remove it"
        document.problems.append(Problem(_end_of(text[: error.position]), message))
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error))
    except (ValueError, OverflowError) as error:
        # PyYAML converts escapes and version numbers without bounds ("\UFFFFFFFF", %YAML 1.9...9).
        mark = Mark(composer.line, composer.column)
        document.problems.append(Problem(mark, f"not valid YAML: {error}"))
    else:
        if node is None:
            document.problems.append(Problem(Mark(0, 0), "the file holds nothing"))
        else:
            document.value = _Builder(document, substitute).build(node, ())
    return document


class _Builder:
    """Turns nodes into values, and notes where they stand and what is wrong with them."""

    def __init__(self, document: Document, substitute: Substitute | None) -> None:
        self._document = document
        self._substitute = substitute

    def build(self, node: yaml.Node, path: Path) -> Value:
        """The value of a node; deep nesting was refused before."""
        mark = _mark(node.start_mark)
        self._document.values[path] = mark
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, number)) for number, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Value]:
        built: dict[str, Value] = {}
        for key_node, value_node in node.value:
            mark = _mark(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(mark, "a key must be plain text", path)
                continue
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                self._problem(mark, "merge keys are not allowed: write the entries out", path)
            elif key in built:
                first = self._document.keys[*path, key].line + 1
                message = f"{key!r} is given twice: it stands on line {first} already"
                self._problem(mark, message, (*path, key))
            else:
                self._document.keys[*path, key] = mark
                built[key] = self.build(value_node, (*path, key))
        return built

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Scalar:
        text = str(node.value)
        if self._substitute is not None:
            try:
                text = self._substitute(text)
            except ValueError as error:
                self._problem(_mark(node.start_mark), str(error), path)
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._problem(_mark(node.start_mark), "half of a surrogate pair is no text", path)
            return ""
        return text if node.style is not None else resolve_scalar(text)

    def _problem(self, mark: Mark, message: str, path: Path) -> None:
        self._document.problems.append(Problem(mark, message, path))


# A leading zero stays text: 012 is neither 10 (YAML 1.1) nor surely 12.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?|[-+]?\.[0-9]+")
_WORDS: Mapping[str, Scalar] = {
    **{word: None for word in ("", "~", "null", "Null", "NULL")},
    **{word: True for word in ("true", "True", "TRUE")},
    **{word: False for word in ("false", "False", "FALSE")},
}


def resolve_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar by the core schema of YAML 1.2, where numbers are decimal."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _mark(mark: object) -> Mark:
    assert isinstance(mark, yaml.Mark)
    return Mark(mark.line, mark.column)


def _end_of(text: str) -> Mark:
    lines = _LINE_BREAK.split(text)
    return Mark(len(lines) - 1, len(lines[-1]))


def _syntax_problem(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    message = " ".join(part for part in (error.context, error.problem) if part)
    if message.startswith("expected a single document"):
        message = "a second document begins: a manifest is one document, so split the file"
    return Problem(_mark(mark) if mark else Mark(0, 0), message or "not valid YAML")
