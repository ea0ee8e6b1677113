"""Where time, randomness and worker threads enter the process.

``Clock``, ``Entropy`` and ``Workers`` are built once in the composition root and handed down; everything below takes
instants, serials and keys as arguments. Nothing else reads a clock or draws a random number (the lint rules say so),
which is what lets tests and the simulator run the real code on virtual time.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec, rsa

T = TypeVar("T")
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

CURVES: dict[int, ec.EllipticCurve] = {
    224: ec.SECP224R1(),
    256: ec.SECP256R1(),
    384: ec.SECP384R1(),
    521: ec.SECP521R1(),
}


class Clock(Protocol):
    """Reads time and waits."""

    def now(self) -> datetime:
        """Wall-clock instant, aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump, for deadlines and ages."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; zero yields to the loop once."""
        ...


class Entropy(Protocol):
    """Draws randomness."""

    def bytes(self, count: int) -> bytes:
        """``count`` bytes fit for keys, serials and ids."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """A float between ``low`` and ``high``, for jitter only."""
        ...

    def private_key(self, kind: str, bits: int) -> PrivateKey:
        """A new key: ``kind`` is ``ec`` (224, 256, 384, 521) or ``rsa`` (2048, 4096); RSA takes up to seconds."""
        ...


class Workers(Protocol):
    """Runs blocking functions off the event loop."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Call ``function(*args)`` elsewhere and return what it returns."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """Wall-clock instant, aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait on the running loop."""
        await asyncio.sleep(seconds)


class SystemEntropy:
    """The operating system's generator."""

    def bytes(self, count: int) -> bytes:
        """``count`` bytes from the system generator."""
        return secrets.token_bytes(count)

    def uniform(self, low: float, high: float) -> float:
        """Jitter; not for keys."""
        return random.uniform(low, high)

    def private_key(self, kind: str, bits: int) -> PrivateKey:
        """Generate an EC or RSA key."""
        if kind == "rsa":
            return rsa.generate_private_key(public_exponent=65537, key_size=bits)
        return ec.generate_private_key(CURVES[bits])


class ThreadWorkers:
    """A small pool of threads of this process."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="worker")

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Call ``function(*args)`` in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """End the pool without waiting for calls still running."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class InlineWorkers:
    """Runs every call at once on the caller's loop: for tests and the simulator."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Call ``function(*args)`` here and now."""
        return function(*args)


def release() -> str:
    """The version of caserver that runs; ``unknown`` in a source tree that was never installed."""
    try:
        return version("caserver")
    except PackageNotFoundError:
        return "unknown"


async def within(clock: Clock, seconds: float, awaitable: Awaitable[T]) -> T:
    """Await with a deadline on ``clock``; TimeoutError once it passes, and what was awaited is cancelled."""
    work = asyncio.ensure_future(awaitable)
    timer = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait((work, timer), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise TimeoutError
        return work.result()
    finally:
        timer.cancel()
        work.cancel()
