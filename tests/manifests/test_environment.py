"""Variables are put into scalars, and what is missing is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.manifests.environment import expand

ENVIRONMENT = {"NAME": "value", "EMPTY": ""}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("${NAME}", "value"),
        ("a-${NAME}-b", "a-value-b"),
        ("${NAME}${NAME}", "valuevalue"),
        ("${MISSING:-default}", "default"),
        ("${EMPTY:-default}", "default"),
        ("${MISSING:-}", ""),
        ("${NAME:-default}", "value"),
        ("${NAME:?message}", "value"),
        ("$${NAME}", "${NAME}"),
        ("5 $ and $NAME", "5 $ and $NAME"),
    ],
)
def test_expands(text: str, expanded: str) -> None:
    assert expand(text, ENVIRONMENT) == expanded


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("${MISSING}", "MISSING is not set"),
        ("${EMPTY}", "EMPTY is not set"),
        ("${MISSING:?say where}", "MISSING: say where"),
        ("${MISSING:?}", "MISSING is not set"),
        ("${NAME", "is no variable"),
        ("${}", "is no variable"),
        ("${1}", "is no variable"),
        ("${NAME:+other}", "is no variable"),
    ],
)
def test_complains(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        expand(text, ENVIRONMENT)


@given(st.text(alphabet=st.characters(exclude_characters="$")))
def test_text_without_dollar_stays(text: str) -> None:
    assert expand(text, {}) == text


def test_a_value_is_not_expanded_again() -> None:
    assert expand("${A}", {"A": "${B}", "B": "x"}) == "${B}"
