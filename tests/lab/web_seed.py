"""Files of a folder over HTTP, in ranges: ``python -m magnetar.tests.lab.web_seed HOST FOLDER``.

What BEP 19 asks of a web seed and no more. ``/sent`` says how many bytes of files it has sent.
"""

import argparse
import re
import urllib.parse
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from magnetar.tests.lab.http_server import NamelessServer

_CHUNK_BYTES = 1 << 16


class WebSeed(NamelessServer):
    """Serves what lies below `root`."""

    def __init__(self, address: tuple[str, int], root: Path) -> None:
        super().__init__(address, _Handler)
        self.root = root.resolve()
        self.sent_bytes = 0


class _Handler(BaseHTTPRequestHandler):
    server: WebSeed
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/sent":
            body = str(self.server.sent_bytes).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        path = (self.server.root / urllib.parse.unquote(self.path).lstrip("/")).resolve()
        if not path.is_relative_to(self.server.root) or not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]), size - 1) if asked and asked[2] else size - 1
        if first > last:
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                self.wfile.write(chunk)
                self.server.sent_bytes += len(chunk)
                left -= len(chunk)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main() -> None:
    """Serves until it is ended; prints its port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with WebSeed((arguments.host, 0), arguments.folder) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
