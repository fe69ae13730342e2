"""A client outside that takes a torrent from whoever connects, and tells how fast it came.

``python -m magnetar.tests.lab.leech ADDRESS TORRENT FOLDER`` prints its port, then the seconds that
the second half of the bytes took.
"""

import sys
import time
from pathlib import Path


def main(address: str, torrent: str, folder: str) -> None:
    """Takes everything."""
    import libtorrent

    session = libtorrent.session(
        {
            "listen_interfaces": f"{address}:0",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_incoming_utp": False,
            "enable_outgoing_utp": False,
        }
    )
    params = libtorrent.load_torrent_buffer(Path(torrent).read_bytes())
    assert params.ti is not None
    half_bytes = params.ti.total_size() // 2
    params.save_path = folder
    handle = session.add_torrent(params)
    while not session.listen_port():
        time.sleep(0.01)
    print(session.listen_port(), flush=True)
    half_s = None
    while not (status := handle.status()).is_seeding:
        if half_s is None and status.total_payload_download > half_bytes:
            half_s = time.monotonic()
        time.sleep(0.02)
    assert half_s is not None
    print(time.monotonic() - half_s, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
