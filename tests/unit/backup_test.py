"""What an upload leaves behind when its client goes away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from caserver.backup import Backups
from tests.testkit.fakes import ManualClock, SeededEntropy, settle
from tests.testkit.nodes import KEYRING


class SlowDisk:
    """A worker whose calls wait until ``release``, as those of a thread do that nobody can stop."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.done = 0

    async def run(self, function: Any, *args: object) -> Any:
        return await asyncio.shield(asyncio.ensure_future(self._call(function, *args)))

    async def _call(self, function: Any, *args: object) -> Any:
        await self.release.wait()
        result = function(*args)
        self.done += 1
        return result


async def test_an_upload_is_let_go_only_when_nothing_is_written_to_it_any_more(tmp_path: Path) -> None:
    """A thread that still writes would write to whatever gets the number of the file next."""
    disk, nothing = SlowDisk(), cast("Any", None)
    backups = Backups(
        nothing,
        nothing,
        keyring=KEYRING,
        clock=ManualClock(),
        entropy=SeededEntropy(),
        workers=cast("Any", disk),
        servers={},
        scratch=tmp_path,
    )
    with backups.upload() as file:
        writing = asyncio.ensure_future(backups.append(file, b"piece"))
        await settle()
        writing.cancel()
        await settle()
        assert not writing.done()

        disk.release.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert disk.done == 1
