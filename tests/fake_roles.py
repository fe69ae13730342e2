"""A stage and a gateway without a model, for tests of the controller that start real actors."""

import os
import socket
import threading
from collections.abc import Mapping, Sequence

from magnetar.cluster.deployment.assignment import (
    GatewayAssignment,
    HelperAssignment,
    RingAssignment,
    StageAssignment,
)
from magnetar.cluster.deployment.status import StageLoad
from magnetar.errors import PortInUseError, StageLostError


class FakeStage:
    """Loads at once; `crash` ends its process as a fault would."""

    def __init__(self, assignment: StageAssignment) -> None:
        self._assignment = assignment
        self._stop = threading.Event()

    def load(self) -> int:
        return self._assignment.stage.weights_bytes

    def loaded(self) -> StageLoad:
        stage = self._assignment.stage
        layers = stage.end_layer - stage.first_layer
        return StageLoad(
            pipeline=self._assignment.pipeline or 0,
            index=stage.index,
            num_layers=layers,
            total_layers=layers,
            num_bytes=stage.weights_bytes,
        )

    def listen(self) -> str:
        return f"{self._assignment.links.listen_host}:{self._assignment.stage.index}"

    def connect(self, downstream: str, helpers: Sequence[str]) -> None:
        self._downstream, self._helpers = downstream, helpers

    def run(self) -> None:
        self._stop.wait()

    def stop(self) -> None:
        self._stop.set()

    def crash(self) -> None:
        os._exit(1)

    def facts(self) -> tuple[StageAssignment, str]:
        """What it was told, for assertions."""
        return self._assignment, self._downstream


class FakeHelper:
    """Loads at once."""

    def __init__(self, assignment: HelperAssignment) -> None:
        self._assignment = assignment
        self._stop = threading.Event()

    def load(self) -> int:
        return self._assignment.helper.weights_bytes

    def loaded_bytes(self) -> int:
        return self._assignment.helper.weights_bytes

    def listen(self) -> str:
        return f"{self._assignment.links.listen_host}:7"

    def connect(self) -> None:
        pass

    def run(self) -> None:
        self._stop.wait()

    def stop(self) -> None:
        self._stop.set()


class FakeGateway:
    """Takes the port and answers nothing; port 1 is always taken, port 2 never gets warm."""

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        self._wish = (host, port)
        self._rings: dict[int, RingAssignment] = {}
        self._downstreams: dict[int, str] = {}
        self._admitted: list[int] = []
        self._stop = threading.Event()

    def bind(self) -> int:
        if self._wish[1] == 1:
            raise PortInUseError("port 1 is in use")
        return self._wish[1]

    def brief(self, assignment: GatewayAssignment) -> None:
        self._assignment = assignment

    def listen(self, pipeline: int, ring: RingAssignment) -> str:
        self._rings[pipeline] = ring
        return f"{ring.links.listen_host}:{9 + pipeline}"

    def connect(self, pipeline: int, downstream: str) -> None:
        self._downstreams[pipeline] = downstream

    def warm(self, pipeline: int) -> float:
        if self._wish[1] == 2:
            raise StageLostError("stage 0 does not answer")
        return 0.001

    def facts(self) -> tuple[GatewayAssignment, dict[int, RingAssignment], list[int]]:
        """What it was told, and whom it admitted, for assertions."""
        return self._assignment, self._rings, self._admitted

    def expert_tokens(self) -> Mapping[int, Sequence[int]]:
        return {0: (3, 1)}

    def serve(self) -> str:
        return f"http://{self._wish[0]}:{self._wish[1]}/on/{socket.gethostname()}"

    def admit(self, pipeline: int) -> None:
        self._admitted.append(pipeline)

    def run(self) -> None:
        self._stop.wait()

    def crash(self) -> None:
        os._exit(1)

    def ending(self, pipeline: int) -> None:
        pass

    def stop(self) -> None:
        self._stop.set()
