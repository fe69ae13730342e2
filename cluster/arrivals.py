"""What a stage's process asks the agent of its node while it loads."""

import threading
from collections.abc import Sequence
from typing import Any, Final

from ..errors import InterruptedByUserError
from ..fetcher.piece_map import ByteRange
from .ray_calls import call
from .ray_runtime import NAMESPACE

WAIT_S: Final = 1.0
"""For one answer; a call occupies a thread of the agent meanwhile."""


def agent_name(deployment: str, host: str) -> str:
    """The name under which Ray knows the agent of a node."""
    return f"{deployment}/agent/{host}"


class AgentArrivals:
    """`Arrivals` by the agent that downloads on this node."""

    def __init__(self, agent: str, stop: threading.Event) -> None:
        """`agent` is the name of its actor; `stop` ends all waiting."""
        self._name = agent
        self._stop = stop
        self._agent: Any = None

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        """Returns once these bytes may be read.

        Raises:
            StageLostError: the agent is gone. InterruptedByUserError: `stop` was set.
        """
        import ray

        if self._agent is None:
            self._agent = ray.get_actor(self._name, namespace=NAMESPACE)
        wanted = tuple(ranges)
        while not call(self._agent.wait.remote(wanted, WAIT_S), who="the agent of this node"):
            if self._stop.is_set():
                raise InterruptedByUserError("stopped while the weights arrived")
