"""The `Fetch` of the release that a deployment asks for."""

import threading
from pathlib import Path

from ...fetcher.fetch import Fetch
from ...fetcher.progress import ProgressSink
from ..spec import SourceSpec


def fetch_of(
    source: SourceSpec,
    store: Path,
    *,
    on_progress: ProgressSink,
    stop: threading.Event,
    node: str = "",
    lan_address: str | None = None,
    who: str = "",
) -> Fetch:
    """Brings the release into `store` as the source says; the caller closes it.

    `node`, `lan_address` and `who` are those of `Fetch`, which raises for what it cannot use.
    """
    return Fetch(
        kind=source.kind,
        location=source.location,
        store=store,
        peers=source.peers,
        trackers=source.trackers,
        web_seeds=source.web_seeds,
        timeout_s=source.timeout_s,
        limits=source.limits,
        on_progress=on_progress,
        stop=stop,
        node=node,
        lan_address=lan_address,
        who=who,
    )
