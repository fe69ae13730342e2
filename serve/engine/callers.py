"""The way back from the engine's thread to whoever waits in an event loop."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...errors import MagnetarError
from .request import TokenEvent


@dataclass(eq=False, slots=True)
class Stream:
    """The events of one request. Holds as many as the request has tokens, at most."""

    request_id: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | MagnetarError] = field(default_factory=asyncio.Queue)

    async def next(self) -> TokenEvent:
        """The next event; raises the error that ended the request. For the stream's own loop."""
        event = await self.events.get()
        if isinstance(event, MagnetarError):
            raise event
        return event


@dataclass(eq=False, slots=True)
class Probe:
    """Somebody who wants to know how long a step takes around the ring."""

    loop: asyncio.AbstractEventLoop
    seconds: asyncio.Future[float]
    step_id: int | None = None
    """The step that is measured, once it is chosen."""
    measured_s: float | None = None
    """The reading, once the step came back."""

    def resolve(self) -> None:
        """Tell the reading. For the engine's thread."""
        assert self.measured_s is not None
        _call(self.loop, _settle, self.seconds, self.measured_s)

    def reject(self, error: MagnetarError) -> None:
        """Tell that there will be none. For the engine's thread."""
        _call(self.loop, _settle, self.seconds, error)


class Callers:
    """The streams of all unfinished requests. One thread, the engine's, calls the methods."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._fresh: list[tuple[Stream, TokenEvent]] = []

    def attach(self, stream: Stream) -> None:
        """Let a stream hear of its request."""
        self._streams[stream.request_id] = stream

    def detach(self, request_id: int) -> None:
        """Forget a stream whose reader has left; unknown ones are ignored."""
        self._streams.pop(request_id, None)

    def collect(self, request_id: int, event: TokenEvent) -> None:
        """Keep an event for `deliver`; the one with a finish reason ends its stream."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        self._fresh.append((stream, event))
        if event.finish_reason is not None:
            del self._streams[request_id]

    def deliver(self) -> list[int]:
        """Hand over what was collected, with one wake-up for each loop.

        Returns the requests whose loop is closed, so that nobody will ever read them.
        """
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, TokenEvent]]]
        by_loop = defaultdict(list)
        for stream, event in self._fresh:
            by_loop[stream.loop].append((stream, event))
        self._fresh.clear()
        return [
            stream.request_id
            for loop, fresh in by_loop.items()
            if not _call(loop, _put_all, fresh)
            for stream, _ in fresh
        ]

    def fail(self, error: MagnetarError) -> None:
        """End every stream with an error of its own: a raised one carries its traceback along."""
        self.deliver()
        for stream in self._streams.values():
            _call(stream.loop, stream.events.put_nowait, type(error)(str(error)))
        self._streams.clear()


def _call(
    loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object
) -> bool:
    """Run `function` in a caller's loop; False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _put_all(fresh: Sequence[tuple[Stream, TokenEvent]]) -> None:
    for stream, event in fresh:
        stream.events.put_nowait(event)


def _settle(future: asyncio.Future[float], outcome: float | MagnetarError) -> None:
    if future.done():  # whoever asked has given up
        return
    if isinstance(outcome, MagnetarError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
