"""However a stream is cut into pieces, the same frames come out of it, the first one to whoever waits for it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.raft.frames import Frames, Malformed
from caserver.raft.messages import FRAME_BYTES_MAX


class Wire(asyncio.Transport):
    """The transport of a connection, as far as it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.aborted = True, False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


def framed(*payloads: bytes) -> bytes:
    return b"".join(len(each).to_bytes(4) + each for each in payloads)


def connected(*, frame_seconds: float = 600.0) -> tuple[Frames, Wire]:
    frames, wire = Frames(first_limit=64, frame_seconds=frame_seconds), Wire()
    frames.connection_made(wire)
    return frames, wire


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    found, at = [], 0
    for size in sizes:
        found.append(data[at : at + size])
        at += size
    return [*found, data[at:]]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 30), max_size=12))
def test_frames_come_out_as_they_went_in(payloads: list[bytes], sizes: list[int]) -> None:
    async def run() -> None:
        frames, _ = connected()
        taken: list[bytes] = []
        delivery = None
        for piece in pieces(framed(b"hello", *payloads), sizes):
            frames.data_received(piece)
            if delivery is None and frames._first.done():
                assert await frames.first() == b"hello"
                delivery = asyncio.create_task(frames.deliver(taken.append))
                await asyncio.sleep(0)
        frames.connection_lost(None)
        assert delivery is not None
        await delivery
        assert taken == payloads

    asyncio.run(run())


async def test_nothing_is_read_between_the_first_frame_and_the_word_to_go_on() -> None:
    frames, wire = connected()
    frames.data_received(framed(b"hello", b"one"))
    assert (await frames.first(), wire.reading) == (b"hello", False)
    seen: list[bytes] = []
    delivery = asyncio.create_task(frames.deliver(seen.append, lambda: seen.append(b"all of them")))
    await asyncio.sleep(0)
    assert wire.reading
    frames.data_received(framed(b"two", b"three"))
    frames.connection_lost(None)
    await delivery
    assert seen == [b"one", b"all of them", b"two", b"three", b"all of them"]


@pytest.mark.parametrize("length", [0, 65, FRAME_BYTES_MAX])
async def test_a_first_frame_of_a_length_that_is_not_allowed_ends_the_connection(length: int) -> None:
    frames, wire = connected()
    frames.data_received(length.to_bytes(4))
    with pytest.raises(Malformed, match="are allowed"):
        await frames.first()
    assert wire.aborted


async def test_a_later_frame_may_be_longer_but_not_too_long() -> None:
    frames, wire = connected()
    frames.data_received(framed(b"hello", bytes(65)) + (FRAME_BYTES_MAX + 1).to_bytes(4))
    await frames.first()
    taken: list[bytes] = []
    with pytest.raises(Malformed, match="are allowed"):
        await frames.deliver(taken.append)
    assert (taken, wire.aborted) == ([bytes(65)], True)


async def test_the_end_of_the_connection_is_told_to_whoever_waits() -> None:
    early, _ = connected()
    early.eof_received()
    with pytest.raises(EOFError):
        await early.first()
    reset, _ = connected()
    reset.data_received(framed(b"hello"))
    reset.connection_lost(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        await reset.deliver(lambda _: None)


async def test_a_frame_that_has_begun_has_to_end_however_it_trickles() -> None:
    frames, wire = connected(frame_seconds=0.05)
    frames.data_received(framed(b"hello"))
    delivery = asyncio.create_task(frames.deliver(lambda _: None))
    await asyncio.sleep(0)
    frames.data_received((1 << 20).to_bytes(4))
    while not delivery.done():
        frames.data_received(b"x")
        await asyncio.sleep(0.005)
    with pytest.raises(TimeoutError, match="the rest of a frame"):
        await delivery
    assert wire.aborted


async def test_what_the_taker_raises_ends_the_connection_and_is_not_the_peers_fault() -> None:
    frames, wire = connected()
    frames.data_received(framed(b"hello", b"x", b"never taken"))
    taken: list[bytes] = []

    def take(payload: bytes) -> None:
        taken.append(payload)
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect") as caught:
        await frames.deliver(take)
    assert (type(caught.value), taken, wire.aborted) == (ValueError, [b"x"], True)
