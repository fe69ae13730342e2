"""What a stage's process asks the agent of its node while it loads."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

from ...errors import InterruptedByUserError
from ...fetcher.checkpoint.arriving import ArrivingTensorSource
from ...fetcher.checkpoint.checked_files import LoadChecks
from ...fetcher.checkpoint.read_ahead import ReadAhead
from ...fetcher.piece_map import ByteRange
from ...fetcher.tensors import TensorEntry, TensorIndex, TensorSource
from ..runtime.ray_calls import call, gather
from ..runtime.ray_runtime import NAMESPACE

WAIT_S: Final = 1.0
"""For one answer; a call occupies a thread of the agent meanwhile."""
AGENT_PART: Final = "/agent/"
_WHO: Final = "the agent of this node"


def agent_name(deployment: str, host: str) -> str:
    """The name under which Ray knows the agent of a node."""
    return f"{deployment}{AGENT_PART}{host}"


class AgentArrivals:
    """`Arrivals` by the agent that downloads on this node."""

    def __init__(self, agent: str, stop: threading.Event) -> None:
        """`agent` is the name of its actor; `stop` ends all waiting."""
        import ray

        self._agent: Any = ray.get_actor(agent, namespace=NAMESPACE)
        self._stop = stop

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        """Returns once these bytes may be read.

        Raises:
            StageLostError: the agent is gone. InterruptedByUserError: `stop` was set.
        """
        wanted = tuple(ranges)
        while not call(self._agent.wait.remote(wanted, WAIT_S), who=_WHO):
            if self._stop.is_set():
                raise InterruptedByUserError("stopped while the weights arrived")

    def mend(self, part: ByteRange) -> None:
        """Has the pieces of these bytes checked and those that are bad fetched anew.

        Waits until the download is over, which may take its time.

        Raises:
            VerifyError: there is nowhere to fetch them from. What `wait` raises.
        """
        gather([self._agent.mend.remote(part)], who=_WHO, stop=self._stop)

    def load_checks(self) -> LoadChecks:
        """What tensors can be checked against as they are read."""
        checks = call(self._agent.load_checks.remote(), who=_WHO)
        assert isinstance(checks, LoadChecks)
        return checks

    def keep_sums(self, sums: Mapping[ByteRange, str]) -> None:
        """Has these SHA-256 remembered for the next time."""
        if sums:
            call(self._agent.keep_sums.remote(sums), who=_WHO)


@contextmanager
def arriving_tensors(
    arrivals: AgentArrivals,
    folder: str,
    index: TensorIndex,
    steps: Sequence[Sequence[TensorEntry]],
) -> Iterator[TensorSource]:
    """Reads the tensors of `steps` as they arrive in the release's folder, a little ahead.

    The agent remembers their SHA-256 where all went well.
    """
    checks = arrivals.load_checks()
    source = ArrivingTensorSource(Path(folder), index, steps, arrivals, checks=checks)
    with ReadAhead(source, chain.from_iterable(steps)) as ahead:
        yield ahead
    arrivals.keep_sums(source.checked.found)
