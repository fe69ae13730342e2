"""A worse link, in user space: ``python -m magnetar.tests.lab.proxy HOST TO_HOST:TO_PORT``.

Passes TCP connections on with a delay each way, and stops for a moment after every so many bytes,
as a connection does that lost a packet.
"""

import argparse
import asyncio
import contextlib

_CHUNK_BYTES = 1 << 15
_QUEUE_CHUNKS = 256


class Proxy:
    """One listener; `delay_s` each way, `stall_s` after every `stall_bytes` of one direction."""

    def __init__(
        self, to: tuple[str, int], *, delay_s: float, stall_bytes: int, stall_s: float
    ) -> None:
        self._to = to
        self._delay_s = delay_s
        self._stall_bytes = stall_bytes
        self._stall_s = stall_s

    async def serve(self, host: str) -> None:
        """Runs until it is cancelled; prints the port."""
        server = await asyncio.start_server(self._connected, host, 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE_CHUNKS)

        async def take() -> None:
            data = b"-"
            while data:
                with contextlib.suppress(ConnectionError):
                    data = await reader.read(_CHUNK_BYTES)
                await under_way.put((clock() + self._delay_s, data))

        taking = asyncio.create_task(take())
        passed = 0
        try:
            while True:
                due_s, data = await under_way.get()
                await asyncio.sleep(max(0.0, due_s - clock()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
                before, passed = passed, passed + len(data)
                if self._stall_bytes and passed // self._stall_bytes > before // self._stall_bytes:
                    await asyncio.sleep(self._stall_s)
        except ConnectionError:
            pass
        finally:
            taking.cancel()
            writer.close()


def main() -> None:
    """Passes on until it is ended; prints its port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("to")
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--stall-bytes", type=int, default=0)
    parser.add_argument("--stall-s", type=float, default=0.2)
    arguments = parser.parse_args()
    host, _, port = arguments.to.rpartition(":")
    proxy = Proxy(
        (host, int(port)),
        delay_s=arguments.delay_s,
        stall_bytes=arguments.stall_bytes,
        stall_s=arguments.stall_s,
    )
    asyncio.run(proxy.serve(arguments.host))


if __name__ == "__main__":
    main()
