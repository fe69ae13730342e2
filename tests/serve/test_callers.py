"""Handing tokens to event loops."""

import asyncio
from collections.abc import Iterator

import pytest

from magnetar.errors import StageLostError
from magnetar.serve.engine.callers import Callers, Stream
from magnetar.serve.engine.request import TokenEvent


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_events_come_in_order_and_only_to_their_own_stream(loop: asyncio.AbstractEventLoop) -> None:
    callers = Callers()
    streams = [Stream(request_id, loop) for request_id in range(2)]
    for stream in streams:
        callers.attach(stream)
    for token_id in range(6):
        callers.collect(token_id % 2, TokenEvent(token_id=token_id))
    assert callers.deliver() == []
    got = [loop.run_until_complete(streams[1].next()).token_id for _ in range(3)]
    assert got == [1, 3, 5]


def test_an_error_comes_after_the_tokens_that_were_there(loop: asyncio.AbstractEventLoop) -> None:
    callers, stream = Callers(), Stream(0, loop)
    callers.attach(stream)
    callers.collect(0, TokenEvent(token_id=1))
    callers.fail(StageLostError("gone"))
    assert loop.run_until_complete(stream.next()).token_id == 1
    with pytest.raises(StageLostError, match="gone"):
        loop.run_until_complete(stream.next())


def test_readers_whose_loop_is_closed_are_reported(loop: asyncio.AbstractEventLoop) -> None:
    callers, closed = Callers(), asyncio.new_event_loop()
    closed.close()
    callers.attach(Stream(0, loop))
    callers.attach(Stream(1, closed))
    for request_id in (0, 1):
        callers.collect(request_id, TokenEvent(token_id=5))
    assert callers.deliver() == [1]


def test_nothing_is_kept_for_a_reader_that_left(loop: asyncio.AbstractEventLoop) -> None:
    callers, stream = Callers(), Stream(0, loop)
    callers.attach(stream)
    callers.detach(0)
    callers.detach(0)
    callers.collect(0, TokenEvent(token_id=5))
    callers.deliver()
    loop.run_until_complete(asyncio.sleep(0))
    assert stream.events.empty()
