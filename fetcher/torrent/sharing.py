"""One member's side of a cluster that fetches together: what others have, what it owns, the rest.

A torrent session wants a piece from everybody or from nobody. So a member shuts the outside out and
takes what its partners hold already, which comes at the speed of the local network. Then it asks
outside for what it owns and for nothing else; at last, shut off again, it takes from its partners
what those have brought meanwhile.
Without that, two thirds of what partners hold would be asked for outside too (measured: 1.15 to
1.38 times the bytes).
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from ..division import Standing
from ..ownership import Role
from ..progress import Phase
from ..waves import Waves
from .magnet import split_peer
from .session import TorrentStatus
from .swarm import StalledError, Swarm

PATIENCE_S = 30.0
"""Without news of the division, partners that bring nothing for so long are given up; what is
missing then comes from outside."""
READY_PATIENCE_S = 5.0
"""What partners hold and do not bring is asked for once more when everything owned is there."""

logger = logging.getLogger(__name__)


class Sharing:
    """The role of one download. `give` and `standing` are for any thread, `fetch` for one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._role: Role | None = None
        self._heard_s = clock()

    def give(self, role: Role | None) -> None:
        """Takes a role, also in the middle of `fetch`; None: everything from anybody."""
        with self._lock:
            self._role, self._heard_s = role, self._clock()

    def standing(self, have: Sequence[bool], received_bytes: int) -> Standing:
        """How far the role is. Whoever asks still watches over the division."""
        with self._lock:
            role, self._heard_s = self._role, self._clock()
        if role is None:
            return Standing(owes=0, lacks=0, received_bytes=received_bytes)
        return Standing(
            owes=sum(not have[piece] for piece in role.owned) if have else len(role.owned),
            lacks=sum(not have[piece] for piece in role.borrowed) if have else len(role.borrowed),
            received_bytes=received_bytes,
        )

    def coming(self, have: Sequence[bool]) -> frozenset[int]:
        """What is being brought from outside; for any thread."""
        role = self._role
        return frozenset() if role is None else frozenset(p for p in role.owned if not have[p])

    def owes(self, have: Sequence[bool]) -> bool:
        """Whether anything that others may wait for is missing."""
        role = self._role
        return role is not None and not all(have[piece] for piece in role.owned)

    def fetch(
        self,
        swarm: Swarm,
        waves: Waves,
        *,
        phase: Phase,
        doing: str,
        timeout_s: float | None,
    ) -> TorrentStatus | None:
        """Brings the waves and what else is owned. None where there is no role, or not any more.

        In the end only partners are let in.

        Raises:
            What `Swarm.fetch` raises.
        """
        tried: Role | None = None
        while (role := self._role) is not None:
            have = swarm.verified()
            ready = waves.only(role.ready)
            own = Waves(tuple(wave & role.owned for wave in waves.waves))
            owned = own.beside(role.carried).within(role.owned)
            is_owner = owned.front(have) < len(owned.waves) if have else True
            takes_ready = bool(have) and tried is not role and ready.front(have) < len(ready.waves)
            if is_owner and not takes_ready:
                swarm.reach_out(True)
                swarm.only(None)
                # Somebody waits for what is lent.
                asked = Waves.of(*waves.only(role.lent).waves, *owned.waves)
                gives_up = self._gives_up(role, None)
            else:
                swarm.reach_out(False)
                swarm.only([split_peer(partner)[0] for partner in role.partners])
                asked, gives_up = waves, self._gives_up(role, timeout_s or float("inf"))
                if takes_ready:
                    asked, gives_up = ready, self._turns_from(role)
            try:
                status = swarm.fetch(
                    asked, whole=waves, phase=phase, doing=doing, gives_up=gives_up
                )
            except StalledError:
                if takes_ready:
                    tried = role
                elif self._role is role:
                    logger.warning("%s: other nodes bring nothing; taking it from outside", doing)
                    self.give(None)
                continue
            if not is_owner and not takes_ready:
                return status
        return None

    def _turns_from(self, role: Role) -> Callable[[float], bool]:
        """Whether to leave for later what partners should have, by the seconds without a byte."""
        return lambda idle_s: self._role is not role or idle_s >= READY_PATIENCE_S

    def _gives_up(self, role: Role, timeout_s: float | None) -> Callable[[float], bool]:
        """Whether to end what this role asks for, by the seconds without a byte."""

        def gives_up(idle_s: float) -> bool:
            if self._role is not role:
                return True
            if timeout_s is None:
                return False
            patience_s = min(PATIENCE_S, timeout_s / 2)
            is_alone = self._clock() - self._heard_s >= patience_s
            return idle_s >= patience_s and (is_alone or idle_s >= 0.8 * timeout_s)

        return gives_up
