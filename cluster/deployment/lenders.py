"""The nodes of a cluster that hold a release already, whichever deployment brought it there."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...fetcher.torrent.lending import Lender
from ..runtime.ray_runtime import NAMESPACE
from .arrivals import AGENT_PART

ASK_TIMEOUT_S: Final = 15.0


def find_lenders(
    info_hash: str, to: Sequence[str], *, but: Sequence[str] = ()
) -> Mapping[str, Lender]:
    """Those that give it to nodes with the addresses `to`, by the names of their agents.

    Agents named in `but` are not asked. One that does not answer in time, for it may be dying,
    lends nothing.
    """
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    names = (actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)
    asked = sorted(name for name in names if AGENT_PART in name and name not in but)
    calls: dict[str, Any] = {}
    for name in asked:
        try:
            agent = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            continue  # It ended just now.
        calls[name] = agent.lend.remote(info_hash, tuple(to))
    if not calls:
        return {}
    answered, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=ASK_TIMEOUT_S)
    found = {}
    for name, call in calls.items():
        if call not in answered:
            continue
        try:
            lender = ray.get(call)
        except ray.exceptions.RayError:
            continue
        if lender is not None:
            found[name] = lender
    return found
