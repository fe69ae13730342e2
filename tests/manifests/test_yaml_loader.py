"""YAML keeps its positions and loses its traps."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.manifests.yaml_loader import MAX_BYTES, MAX_NODES, Document, Mark, load_yaml


def problems_of(text: str) -> list[str]:
    return [problem.message for problem in load_yaml(text.encode()).problems]


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("012", "012"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2026-01-01", "2026-01-01"),
        (".inf", ".inf"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("0", 0),
        ("-7", -7),
        ("1e6", 1e6),
        ("2.5", 2.5),
        ("'7'", "7"),
        ('"true"', "true"),
    ],
)
def test_scalars_follow_yaml_1_2(scalar: str, value: object) -> None:
    document = load_yaml(f"key: {scalar}\n".encode())
    assert not document.problems
    assert document.value == {"key": value}
    assert type(document.value["key"]) is type(value)


def test_marks_say_where_keys_and_values_stand() -> None:
    document = load_yaml(b"a:\n  - x\n  - b: 1\n")
    assert document.keys["a", 1, "b"] == Mark(2, 4)
    assert document.values["a", 0] == Mark(1, 4)
    assert document.values["a", 1, "b"] == Mark(2, 7)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &x 1\n", "anchors are not allowed"),
        ("a: 1\nb: *x\n", "aliases are not allowed"),
        ("a:\n  <<: {b: 1}\n", "merge keys are not allowed"),
        ("a: 1\nb: 2\na: 3\n", "'a' is given twice: it stands on line 1 already"),
        ("a: 1\n---\nb: 2\n", "a second document begins"),
        ("a: !!python/object:os.system 1\n", "tags are not allowed"),
        ("? [a]\n: 1\n", "a key must be plain text"),
        ("[" * 100, "nested deeper than"),
        ("- " * 100, "nested deeper than"),
        ("[" + "1," * MAX_NODES + "]", "more than 10000 values"),
        ("a" * (MAX_BYTES + 1), "too many for a manifest"),
        ("a: [1\n", "expected ',' or ']'"),
        ("a: \x01\n", "is not allowed"),
        ('"\\UFFFFFFFF"', "not valid YAML"),
        ('"\\ud800"', "surrogate"),
        ("%YAML 1." + "9" * 5000 + "\n--- a\n", "not valid YAML"),
        ("", "the file holds nothing"),
        ("# only a comment\n", "the file holds nothing"),
    ],
)
def test_trap_is_refused(text: str, complaint: str) -> None:
    assert any(complaint in problem for problem in problems_of(text)), problems_of(text)


def test_text_that_is_not_utf8_is_refused_where_it_breaks() -> None:
    (problem,) = load_yaml(b"a: 1\nb: \xff\n").problems
    assert problem.mark == Mark(1, 3)


def test_several_problems_are_found_at_once() -> None:
    assert len(problems_of("a: &x 1\nb: !!int 2\nc: 3\nc: 4\n<<: 5\n")) == 4


def test_merge_bomb_is_refused_in_an_instant() -> None:
    levels = "".join(
        f"k{n}: &k{n}\n  <<: [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 20)
    )
    began = time.perf_counter()
    assert problems_of("k0: &k0 {a: 1}\n" + levels)
    assert time.perf_counter() - began < 0.5


def test_substitution_sees_values_and_not_keys_and_adds_no_structure() -> None:
    document = load_yaml(
        b"KEY: VALUE\nplain: N\nquoted: 'N'\n",
        substitute=lambda text: {"VALUE": "{a: [1]}", "N": "7"}.get(text, text),
    )
    assert document.value == {"KEY": "{a: [1]}", "plain": 7, "quoted": "7"}


def test_complaint_of_the_substitution_is_a_problem_at_the_value() -> None:
    def refuse(text: str) -> str:
        raise ValueError(f"no {text}")

    (problem,) = load_yaml(b"a: x\n", substitute=refuse).problems
    assert (problem.message, problem.mark, problem.path) == ("no x", Mark(0, 3), ("a",))


@given(st.binary(max_size=200))
def test_no_bytes_crash_it(raw: bytes) -> None:
    document = load_yaml(raw)
    assert document.problems or document.values


@given(st.text(alphabet="ab:-?!&*[]{}<>,|'\"\\#%@` \n\t0x~U", max_size=120))
def test_no_yaml_like_text_crashes_it(text: str) -> None:
    document: Document = load_yaml(text.encode())
    assert document.problems or document.values
