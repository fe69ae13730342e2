"""Variables in a manifest: ``${VAR}``, ``${VAR:-default}``, ``${VAR:?message}``; ``$$`` is a ``$``.

Substitution works on one scalar after the YAML is parsed, so a value can never add structure.
"""

import re
from collections.abc import Mapping

_REFERENCE = re.compile(
    r"\$(?:(?P<dollar>\$)"
    r"|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:(?P<operator>:[-?])(?P<operand>[^{}]*))?\}"
    r"|(?P<broken>\{[^}]*\}?))"
)


def expand(text: str, environment: Mapping[str, str]) -> str:
    """``text`` with its variables put in; a variable that is empty counts as not set.

    Raises:
        ValueError: a variable without a value or default, or a reference that is malformed.
    """

    def value_of(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["broken"]:
            raise ValueError(
                f"{match[0]!r} is no variable: write ${{NAME}}, ${{NAME:-default}} or "
                "${NAME:?message}, and $$ for a dollar sign"
            )
        name, operator, operand = match["name"], match["operator"], match["operand"]
        if value := environment.get(name):
            return value
        if operator == ":-":
            return str(operand)
        if operator == ":?" and operand:
            raise ValueError(f"{name}: {operand}")
        raise ValueError(f"the variable {name} is not set: set it, or write ${{{name}:-default}}")

    return _REFERENCE.sub(value_of, text)
