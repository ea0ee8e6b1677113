"""The two disks of the product: a directory, and memory for ``-dev`` and tests.

A ``PosixDisk`` keeps each appended file open. Directories that it makes are 0700 and files 0600. It never hides an error:
after a failed write or fsync the page cache can no longer be trusted, so the journal stops the node.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOCK_FILE = "lock"
_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600
_SPARE = 2  # descriptors kept for a want of them: a journal that cannot be rewritten would end the node
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW  # a link planted in the directory must not redirect what is written


class PosixDisk:
    """Files of one directory, made if missing; OSError if others may write into it.

    Calls for one file must follow each other; those for different files may come from different threads.
    """

    def __init__(self, directory: Path) -> None:
        missing = [each for each in (directory, *directory.parents) if not each.exists()]
        directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        for each in missing:
            with suppress(PermissionError):  # to list the one around it, which making one in it does not take
                _sync_directory(each.parent)
        if stat.S_IMODE(directory.stat().st_mode) & stat.S_IWOTH:
            raise PermissionError(
                errno.EPERM,
                "every user may write into the data directory; use one of its own, made with mode 0700",
                str(directory),
            )
        self._directory = directory
        self._appending: dict[str, int] = {}
        self._unlisted: set[str] = set()  # files whose directory entry is not durable yet
        self._lock: int | None = None
        # Held from the start: nothing that is under way may fail for want of a descriptor.
        self._listing: int | None = self._open_listing()
        self._spare: list[int] = [self._open_listing() for _ in range(_SPARE)]

    def __repr__(self) -> str:
        return f"PosixDisk({str(self._directory)!r})"

    def read(self, name: str) -> bytes | None:
        """The whole file, or None if there is none."""
        try:
            descriptor = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            content = file.read()
        self._save_spare()
        return content

    def append(self, name: str, data: bytes) -> None:
        """Append all of ``data``, creating the file if needed; after an OSError a part of it may be there."""
        _write_all(self._append_descriptor(name), data)

    def datasync(self, name: str) -> None:
        """Return when everything appended to ``name``, and the file's place in the directory, is durable."""
        os.fdatasync(self._append_descriptor(name))
        if name in self._unlisted:
            self._sync_directory()
            self._unlisted.clear()

    def replace(self, name: str, data: bytes | None) -> None:
        """Make ``data`` the whole content, atomically and durably; None removes the file."""
        path = self._directory / name
        if data is None:
            self._forget(name)
            path.unlink(missing_ok=True)
            self._sync_directory()
            return
        temporary = f"{name}.new"
        descriptor = self._open(temporary, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
            (self._directory / temporary).rename(path)
        except BaseException:
            os.close(descriptor)
            raise
        self._take_over(name, descriptor)
        self._save_spare()
        self._sync_directory()

    def _take_over(self, name: str, descriptor: int) -> None:
        """Go on appending to the file that took the place of the former one."""
        if name not in self._appending:
            os.close(descriptor)
            return
        self._forget(name)
        self._appending[name] = descriptor

    def lock(self) -> None:
        """Take the directory for as long as this object is open; BlockingIOError if another process has it."""
        if self._lock is not None:
            return
        descriptor = os.open(self._directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | _OPEN, _FILE_MODE)
        try:
            # flock belongs to the open file, so two disks in one process exclude each other as well.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(descriptor)
            if exc.errno != errno.EWOULDBLOCK:
                raise
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "another caserver process uses the data directory; stop it, or give each process a data_dir of its own",
                str(self._directory),
            ) from exc
        self._lock = descriptor

    def close(self) -> None:
        """Close all files and release the directory; what was not synced stays with the kernel."""
        for name in tuple(self._appending):
            self._forget(name)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._listing is not None:
            os.close(self._listing)
            self._listing = None
        while self._spare:
            os.close(self._spare.pop())

    def _append_descriptor(self, name: str) -> int:
        held = self._appending.get(name)
        if held is not None:
            return held
        # Also of a file that is there: the process that renamed it may have died before the directory was durable.
        self._unlisted.add(name)
        descriptor = self._appending[name] = self._open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return descriptor

    def _open(self, name: str, flags: int) -> int:
        """A new descriptor; where others took the last one of the process or of the machine, a spare one makes room."""
        path = self._directory / name
        try:
            return os.open(path, flags | _OPEN, _FILE_MODE)
        except OSError as exc:
            if exc.errno not in {errno.EMFILE, errno.ENFILE} or not self._spare:
                raise
        os.close(self._spare.pop())
        return os.open(path, flags | _OPEN, _FILE_MODE)

    def _open_listing(self) -> int:
        return os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _save_spare(self) -> None:
        """Take a descriptor back for the next want, where there is one: what was opened last is closed again."""
        with suppress(OSError):
            while self._listing is not None and len(self._spare) < _SPARE:
                self._spare.append(self._open_listing())

    def _forget(self, name: str) -> None:
        descriptor = self._appending.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)
        self._unlisted.discard(name)

    def _sync_directory(self) -> None:
        if self._listing is None:
            raise OSError(errno.EBADF, "the disk is closed", str(self._directory))
        os.fsync(self._listing)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class MemoryDisk:
    """A disk that dies with the process, for ``-dev``; it knows which bytes a power loss would spare."""

    def __init__(self, *, before_change: Callable[[str, str], None] | None = None) -> None:
        """``before_change(operation, name)`` sees each append, datasync and replace first, and may raise OSError."""
        self._files: dict[str, bytearray] = {}
        self._durable_bytes: dict[str, int] = {}
        self._locked = False
        self._before_change = before_change

    def read(self, name: str) -> bytes | None:
        """The whole file, or None if there is none."""
        content = self._files.get(name)
        return None if content is None else bytes(content)

    def append(self, name: str, data: bytes) -> None:
        """Append ``data``; lost in a power loss until ``datasync``."""
        self._announce("append", name)
        self._files.setdefault(name, bytearray()).extend(data)

    def datasync(self, name: str) -> None:
        """Make what was appended survive ``after_power_loss``."""
        self._announce("datasync", name)
        self._durable_bytes[name] = len(self._files.setdefault(name, bytearray()))

    def replace(self, name: str, data: bytes | None) -> None:
        """Make ``data`` the whole, durable content; None removes the file."""
        self._announce("replace", name)
        if data is None:
            self._files.pop(name, None)
            self._durable_bytes.pop(name, None)
            return
        self._files[name] = bytearray(data)
        self._durable_bytes[name] = len(data)

    def lock(self) -> None:
        """Take the disk; BlockingIOError if it is taken."""
        if self._locked:
            raise BlockingIOError(errno.EWOULDBLOCK, "the disk is in use")
        self._locked = True

    def close(self) -> None:
        """Release the disk."""
        self._locked = False

    def after_power_loss(self, *, surviving_bytes: int = 0) -> MemoryDisk:
        """A new disk with what was durable, and of each file up to ``surviving_bytes`` that were not."""
        survivor = MemoryDisk()
        for name, content in self._files.items():
            durable = self._durable_bytes.get(name)
            if durable is None and not surviving_bytes:
                continue
            kept = content[: (durable or 0) + surviving_bytes]
            survivor._files[name] = kept
            survivor._durable_bytes[name] = len(kept)
        return survivor

    def _announce(self, operation: str, name: str) -> None:
        if self._before_change is not None:
            self._before_change(operation, name)
