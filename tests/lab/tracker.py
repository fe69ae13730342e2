"""A small BitTorrent tracker over HTTP, for one test: ``python -m magnetar.tests.lab.tracker``.

It knows every peer that announced, by the address that it came from, and says so at /peers.
"""

import argparse
import json
import urllib.parse
from http.server import BaseHTTPRequestHandler

from magnetar.fetcher.torrent.bencode import Bencoded, encode
from magnetar.tests.lab.http_server import NamelessServer

INTERVAL_S = 2


class Tracker(NamelessServer):
    """Keeps one swarm for each info-hash."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.peers: dict[bytes, dict[tuple[str, int], str]] = {}


class _Handler(BaseHTTPRequestHandler):
    server: Tracker

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/announce":
            self._answer(self._announce(query))
        elif path == "/peers":
            seen = {host for swarm in self.server.peers.values() for host, _ in swarm}
            self._answer(json.dumps(sorted(seen)).encode())
        else:
            self.send_error(404)

    def _announce(self, query: str) -> bytes:
        # Info-hashes are bytes, not text.
        fields = dict(urllib.parse.parse_qsl(query, encoding="latin-1"))
        own = (self.client_address[0], int(fields["port"]))
        swarm = self.server.peers.setdefault(fields["info_hash"].encode("latin-1"), {})
        swarm[own] = fields.get("event", "")
        others: list[Bencoded] = [
            {b"ip": host.encode(), b"port": port}
            for (host, port), event in swarm.items()
            if (host, port) != own and event != "stopped"
        ]
        return encode({b"interval": INTERVAL_S, b"min interval": INTERVAL_S, b"peers": others})

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main() -> None:
    """Answers until it is ended; prints its port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    with Tracker((parser.parse_args().host, 0)) as tracker:
        print(tracker.server_address[1], flush=True)
        tracker.serve_forever()


if __name__ == "__main__":
    main()
