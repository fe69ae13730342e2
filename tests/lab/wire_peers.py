"""Peers that know just enough of the wire protocol (BEP 3) to serve a torrent, rightly or not.

They have every piece, let everybody download, count what they sent, and send whatever `read` says:
the bytes of a file, noise, or zeros for a torrent too large to exist. They run in one thread.
"""

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from magnetar.fetcher.torrent.metainfo import Metainfo

Read = Callable[[int, int, int], bytes]
"""Piece, first byte in it, and size of a block -> what is sent for it."""

_Block = tuple[int, int, int]
"""Piece, first byte in it, and size."""

_PROTOCOL: Final = b"\x13BitTorrent protocol"
_HANDSHAKE_BYTES: Final = len(_PROTOCOL) + 8 + 20 + 20
_UNCHOKE: Final = b"\0\0\0\1\1"
_BITFIELD, _REQUEST, _PIECE, _CANCEL = 5, 6, 7, 8
_REQUEST_BYTES: Final = 13
_MAX_MESSAGE_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 1 << 16
_SEND_BUFFER_BYTES: Final = 1 << 17
"""Small, so that what was sent has nearly arrived."""


@dataclass(kw_only=True)
class WirePeer:
    """One of them."""

    read: Read
    host: str = "127.0.0.1"
    bytes_per_s: int = 0
    """Of each connection; 0: as fast as it can."""
    port: int = 0
    """Where it listens, once it is started."""
    sent: Counter[int] = field(default_factory=Counter)
    """Piece -> payload bytes."""
    num_connections: int = 0

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return f"{self.host}:{self.port}"

    @property
    def sent_bytes(self) -> int:
        """Payload in all."""
        return self.sent.total()


class WirePeers:
    """Peers of one torrent while the context lasts."""

    def __init__(self, metainfo: Metainfo, peers: Iterable[WirePeer]) -> None:
        self.peers = tuple(peers)
        self._info_hash = bytes.fromhex(metainfo.info_hash)
        self._bitfield = _bitfield(metainfo.num_pieces)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire-peers")
        self._numbers = itertools.count()
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._servers = []
        for peer in self.peers:
            server = await asyncio.start_server(self._serving(peer), peer.host, peer.port)
            peer.port = server.sockets[0].getsockname()[1]
            self._servers.append(server)

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _serving(
        self, peer: WirePeer
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(self._serve(peer, reader, writer))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

        return serve

    async def _serve(
        self, peer: WirePeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            theirs = await reader.readexactly(_HANDSHAKE_BYTES)
            # Whoever tries an encrypted handshake first comes again without.
            if theirs.startswith(_PROTOCOL) and theirs[28:48] == self._info_hash:
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
                peer.num_connections += 1
                own_id = b"-MG0000-%012d" % next(self._numbers)
                writer.write(_PROTOCOL + bytes(8) + self._info_hash + own_id)
                writer.write(self._bitfield + _UNCHOKE)
                await self._answer(peer, reader, writer)
        writer.close()

    async def _answer(
        self, peer: WirePeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        asked: dict[_Block, None] = {}
        news = asyncio.Event()
        sending = self._loop.create_task(self._send(peer, writer, asked, news))
        received = bytearray()
        try:
            while (data := await reader.read(_CHUNK_BYTES)) and not sending.done():
                received += data
                _take(received, asked)
                news.set()
        finally:
            sending.cancel()

    async def _send(
        self,
        peer: WirePeer,
        writer: asyncio.StreamWriter,
        asked: dict[_Block, None],
        news: asyncio.Event,
    ) -> None:
        began_s, sent_bytes = self._loop.time(), 0
        while True:
            while not asked:
                news.clear()
                await news.wait()
            piece, begin, length = block = next(iter(asked))
            del asked[block]
            header = struct.pack(">IBII", 9 + length, _PIECE, piece, begin)
            writer.writelines((header, peer.read(piece, begin, length)))
            await writer.drain()
            peer.sent[piece] += length
            sent_bytes += length
            if peer.bytes_per_s:
                due_s = began_s + sent_bytes / peer.bytes_per_s
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))


def _take(received: bytearray, asked: dict[_Block, None]) -> None:
    """Takes whole messages out of what came, and notes what they ask for and take back."""
    at = 0
    while len(received) - at >= 4:
        size = int.from_bytes(received[at : at + 4])
        if size > _MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {size} bytes")
        if len(received) - at < 4 + size:
            break
        if size == _REQUEST_BYTES and received[at + 4] in (_REQUEST, _CANCEL):
            block = struct.unpack_from(">III", received, at + 5)
            if received[at + 4] == _REQUEST:
                asked[block] = None
            else:
                asked.pop(block, None)
        at += 4 + size
    del received[:at]


def _bitfield(num_pieces: int) -> bytes:
    """The message that says that all of them are there; the bits beyond the last are zero."""
    bits = ((1 << num_pieces) - 1) << (-num_pieces % 8)
    field = bits.to_bytes((num_pieces + 7) // 8)
    return struct.pack(">IB", 1 + len(field), _BITFIELD) + field
