"""Rounds of rates become a verdict, and verdicts a table."""

import statistics
from collections.abc import Sequence
from typing import Any

from magnetar.benchmarks.cases import Case


def verdict(case: Case, ours: Sequence[float], rates: dict[str, list[float]]) -> dict[str, Any]:
    """The object that is printed; `rates` are the others', a round each as `ours`."""
    result: dict[str, Any] = {"case": case.name, "ours": round(statistics.median(ours), 2)}
    if not rates:
        return result | {"best_peer": None, "ratio": None, "goal": case.goal, "holds": None}
    best = max(rates, key=lambda label: statistics.median(rates[label]))
    ratio = statistics.median(a / b for a, b in zip(ours, rates[best], strict=True))
    return result | {
        "best_peer": best,
        "reference": round(statistics.median(rates[best]), 2),
        "ratio": round(ratio, 3),
        "goal": case.goal,
        "holds": None if case.goal is None else ratio >= case.goal,
        "rates": {label: round(statistics.median(of), 2) for label, of in rates.items()},
        "spread": [round(min(ours), 2), round(max(ours), 2)],
        "rounds": len(ours),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The verdicts as people read them."""
    rows = [f"{'case':<23} {'ours':>8} {'other':>8} {'ratio':>6} {'goal':>9}  holds  against"]
    for result in results:
        if "skipped" in result:
            rows.append(f"{result['case']:<23} {result['skipped']}")
            continue
        others = result.get("rates") or {}
        against = ", ".join(f"{label} {rate:g}" for label, rate in others.items())
        numbers = [result.get(key) for key in ("ours", "reference", "ratio")]
        ours, other, ratio = ["-" if each is None else f"{each:.2f}" for each in numbers]
        goal = "-" if result["goal"] is None else str(result["goal"])
        holds = {True: "yes", False: "no", None: "-"}[result["holds"]]
        rows.append(
            f"{result['case']:<23} {ours:>8} {other:>8} {ratio:>6} {goal:>9}"
            f"  {holds:<5}  {against or result.get('best_peer') or result.get('unit', '')}"
        )
    return "\n".join(rows)
