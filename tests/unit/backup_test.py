"""What an upload leaves behind when its client goes away."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any, cast

import pytest

from caserver.backup import Backups
from caserver.errors import Unavailable
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


class FullDisk:
    """A worker whose writes fail as on a disk without room."""

    async def run(self, function: Any, *args: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def backups_on(workers: object, scratch: Path) -> Backups:
    nothing = cast("Any", None)
    return Backups(
        nothing,
        nothing,
        keyring=KEYRING,
        clock=ManualClock(),
        entropy=SeededEntropy(),
        workers=cast("Any", workers),
        servers={},
        scratch=scratch,
    )


async def test_an_upload_that_finds_no_room_is_told_so(tmp_path: Path) -> None:
    backups = backups_on(FullDisk(), tmp_path)
    with backups.upload() as file, pytest.raises(Unavailable, match="No space left on device"):
        await backups.append(file, b"piece")
    with pytest.raises(Unavailable, match="No such file or directory"):
        backups_on(FullDisk(), tmp_path / "gone").upload()


async def test_an_upload_is_let_go_only_when_nothing_is_written_to_it_any_more(tmp_path: Path) -> None:
    """A thread that still writes would write to whatever gets the number of the file next."""
    disk = SlowDisk()
    backups = backups_on(disk, tmp_path)
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
