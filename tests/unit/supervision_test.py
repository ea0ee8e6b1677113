import asyncio
from collections.abc import Awaitable, Callable

import pytest
import structlog.testing

from caserver.supervision import Supervisor


async def ends() -> None:
    await asyncio.sleep(0)


async def breaks() -> None:
    raise LookupError("a defect")


async def is_cancelled_by_a_stranger() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def awaits_what_was_cancelled() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (ends, "the part ended"),
        (breaks, "a defect"),
        (is_cancelled_by_a_stranger, "the part was cancelled"),
        (awaits_what_was_cancelled, "the part was cancelled"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_part_that_ends_by_itself_is_a_failure(work: Callable[[], Awaitable[None]], reason: str) -> None:
    supervisor = Supervisor()
    with structlog.testing.capture_logs() as lines:
        async with supervisor.running("part", work):
            await asyncio.wait((supervisor.failed,), timeout=10)

    assert reason in str(supervisor.failed.exception())
    assert [each["part"] for each in lines] == ["part"]


async def test_leaving_ends_the_part_and_is_no_failure() -> None:
    supervisor, ended = Supervisor(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with supervisor.running("part", work):
        await asyncio.sleep(0)

    assert ended.is_set()
    assert not supervisor.failed.done()


async def test_of_two_failures_the_first_is_told() -> None:
    supervisor = Supervisor()
    async with supervisor.running("one", breaks):
        await asyncio.wait((supervisor.failed,), timeout=10)
        async with supervisor.running("two", ends):
            await asyncio.sleep(0.01)

    assert isinstance(supervisor.failed.exception(), LookupError)
