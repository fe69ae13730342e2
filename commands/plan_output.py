"""A plan in the form that was asked for: table, JSON, YAML or picture, or what it would change."""

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    from ..serve.launch import PlanPreview

PlanOutput = Literal["table", "json", "yaml", "svg"]


def shown_plan(preview: "PlanPreview", *, name: str, output: PlanOutput) -> str:
    """The plan itself, or what it would change of what runs.

    Raises:
        UsageError: a picture of a difference.
    """
    from ..cluster.planning.plan_diff import diff_json, diff_table, plan_diff
    from ..cluster.planning.plan_picture import plan_svg
    from ..cluster.planning.plan_view import plan_json, plan_table

    if preview.running is not None:
        if output == "svg":
            raise UsageError("there is no picture of a difference; leave out --diff or -o svg")
        diff = plan_diff(preview.running, preview.plan, preview.facts.index)
        return diff_table(diff) if output == "table" else _document(diff_json(diff), output)
    if output == "svg":
        num_experts = preview.facts.config.num_experts
        return plan_svg(preview.plan, num_experts=num_experts, title=name).rstrip()
    if output == "table":
        # Whoever parses lines gets them whole.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return plan_table(preview.plan, preview.explanation, width=width)
    return _document(plan_json(preview.plan, preview.explanation), output)


def _document(told: dict[str, Any], output: PlanOutput) -> str:
    if output == "json":
        return json.dumps(told, indent=2 if sys.stdout.isatty() else None)
    import yaml

    # By way of JSON, for YAML would mark tuples.
    return yaml.safe_dump(json.loads(json.dumps(told)), sort_keys=False).rstrip()
