"""The actor that holds experts of a stage on another device."""

import threading
from typing import TYPE_CHECKING

from ..cluster.deployment.arrivals import AgentArrivals, arriving_tensors
from ..cluster.deployment.assignment import HelperAssignment, helper_name, stage_name
from ..cluster.deployment.shard import helper_shard, steps_of
from ..fetcher.checkpoint.release import facts_from_json
from .model.threads import end_team, prepare_threads
from .ring import LINK_TIMEOUT_S, listen

if TYPE_CHECKING:
    from ..cluster.links.listener import LinkListener
    from .engine.helper import Helper
    from .engine.helper_worker import HelperWorker


class HelperActor:
    """Plays `cluster.deployment.assignment.HelperRole`."""

    def __init__(self, assignment: HelperAssignment) -> None:
        self._assignment = assignment
        self._loaded_bytes = 0
        self._stop = threading.Event()
        self._helper: Helper | None = None
        self._listener: LinkListener | None = None
        self._worker: HelperWorker | None = None

    def load(self) -> int:
        """Read the weights of the experts as they arrive in the files."""
        prepare_threads()
        import torch

        from .engine.helper import Helper

        given, host = self._assignment, self._assignment.helper
        torch.set_num_threads(host.num_threads)
        facts = facts_from_json(given.facts_json)
        arrivals = AgentArrivals(given.agent, self._stop)
        steps = steps_of(helper_shard(facts.index, host, given.first_layer))
        with arriving_tensors(arrivals, given.folder, facts.index, steps) as source:
            self._helper = Helper.load(
                config=facts.config,
                source=source,
                experts=dict(enumerate(host.experts, start=given.first_layer)),
                dtype=given.dtype,
                device=host.device,
                batch_invariant=given.batch_invariant,
                on_layer=self._count,
            )
        end_team()
        return self._helper.loaded_bytes

    def loaded_bytes(self) -> int:
        """How far `load` is."""
        return self._loaded_bytes

    def listen(self) -> str:
        """Open the link of the stage."""
        self._listener = listen(self._assignment.links)
        return self._listener.address

    def connect(self) -> None:
        """Accept the stage and begin to serve it."""
        from .engine.helper_worker import HelperWorker

        assert self._listener is not None
        assert self._helper is not None
        given = self._assignment
        self._worker = HelperWorker(
            self._helper,
            link=self._listener.accept(LINK_TIMEOUT_S),
            name=helper_name(given.helper, of=stage_name(given.stage_index, given.pipeline)),
        )
        self._worker.start()

    def run(self) -> None:
        """Stay until `stop`; raise what ended the worker otherwise."""
        assert self._worker is not None
        self._worker.wait()

    def stop(self) -> None:
        """End loading, the worker and the link."""
        self._stop.set()
        if self._worker is not None:
            self._worker.stop()
        if self._listener is not None:
            self._listener.close()

    def _count(self, loaded_bytes: int) -> None:
        self._loaded_bytes = loaded_bytes
