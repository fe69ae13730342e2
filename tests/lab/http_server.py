"""An HTTP server that starts at once where nobody knows names."""

import socketserver
from http.server import ThreadingHTTPServer


class NamelessServer(ThreadingHTTPServer):
    """Does not ask who its address is: in a namespace without a resolver that takes 5 s."""

    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
