"""One deployment of a cluster after the other says what it brings of a release from outside.

Two that looked for lenders at the same moment would find nobody, and bring the same bytes twice.
Whoever comes second finds the first one's agents, which tell what they are bringing.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

POLL_S: Final = 0.1
PATIENCE_S: Final = 20.0
"""A deployment that has not finished its turn by then is dead, or as good as."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def turn(
    info_hash: str,
    deployment: str,
    stop: threading.Event,
    *,
    store: Any = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Waits until no other deployment of the cluster divides this release, or is given up.

    Ray's head keeps the turn, in `store`, so that nothing has to run for it. Returns early, too,
    when `stop` is set.
    """
    if store is None:
        from ray.experimental import internal_kv

        store = internal_kv
    key = f"magnetar/turn/{info_hash}"
    until_s = clock() + PATIENCE_S
    while store._internal_kv_put(key, deployment, overwrite=False):
        if clock() > until_s:
            logger.warning("%s: another deployment fetches it and does not answer", info_hash)
            store._internal_kv_put(key, deployment)
            break
        if stop.wait(POLL_S):
            break
    try:
        yield
    finally:
        if store._internal_kv_get(key) == deployment.encode():
            store._internal_kv_del(key)
