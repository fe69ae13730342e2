"""The memory that Ray keeps for the members of all pipelines, and the actors put into it."""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...errors import InterruptedByUserError, PreflightError
from ..plan import ExpertHost, StagePlan
from ..runtime.ray_runtime import RayNode

PLACE_TIMEOUT_S: Final = 60.0
METHODS_AT_ONCE: Final = 4


class Reservation:
    """One placement group with a bundle for each member of the plan, on the member's node.

    A bundle outlives its actor, and is placed again when its node comes back under its label.
    """

    def __init__(
        self,
        members: Sequence[StagePlan | ExpertHost],
        *,
        nodes: Mapping[str, RayNode],
        prefix: str,
        lifetime: str | None,
        stop: threading.Event,
    ) -> None:
        """`prefix` begins the names of the group and of the actors in it."""
        from ray.util.placement_group import placement_group

        self._members = tuple(members)
        self._prefix = prefix
        self._lifetime = lifetime
        self._stop = stop
        self._group: Any = placement_group(
            # A card's memory is not Ray's to count; the bundle then only pins the node.
            [{"memory": _reserved_bytes(member)} for member in members],
            strategy="PACK",
            name=prefix,
            lifetime=lifetime,
            bundle_label_selector=[nodes[member.host].selector for member in members],
        )

    def wait(self) -> None:
        """Until all bundles are placed.

        Raises:
            PreflightError: somebody else has reserved the memory in the meantime.
            InterruptedByUserError: `stop` was set.
        """
        deadline = time.monotonic() + PLACE_TIMEOUT_S
        while not self._group.wait(1):
            if self._stop.is_set():
                raise InterruptedByUserError("stopped")
            if time.monotonic() > deadline:
                wanted = ", ".join(
                    f"{_reserved_bytes(member) / 1e9:.1f} GB on {member.host}"
                    for member in self._members
                )
                raise PreflightError(
                    f"Ray does not grant the memory that the plan found free ({wanted}); another "
                    "deployment has reserved it: take that down, or use other nodes"
                )

    def start(self, role: type[Any], assignment: object, name: str, bundle: int) -> Any:
        """An actor for the member with this index."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return (
            ray.remote(role)
            .options(
                name=f"{self._prefix}/{name}",
                lifetime=self._lifetime,
                num_cpus=0,
                max_concurrency=METHODS_AT_ONCE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=bundle
                ),
            )
            .remote(assignment)
        )

    def end(self) -> None:
        """Give the memory back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(ray.exceptions.RayError):
            remove_placement_group(self._group)


def _reserved_bytes(member: StagePlan | ExpertHost) -> int:
    kv_bytes = member.kv_bytes if isinstance(member, StagePlan) else 0
    return max(1, member.weights_bytes + kv_bytes) if member.device == "cpu" else 1
