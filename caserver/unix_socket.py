"""A Unix socket to listen on: bound with its owner and mode in place before anybody can connect, and removed at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

SCHEME = "unix://"
PATH_MAX = 107  # bytes, of sockaddr_un
_BACKLOG = 1024
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """Where a socket lies and who may connect; None leaves owner, group or mode as the process gives them."""

    path: Path
    mode: int | None = None
    user: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.path}"


Inode = tuple[int, int]  # device, number


def bound(where: UnixSocket) -> tuple[socket.socket, Inode]:
    """Listen at ``where``, in place of a socket that nobody serves any more; OSError says why not.

    The inode is for ``remove``.
    """
    _clear(where.path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made = False
    try:
        listening.bind(os.fspath(where.path))
        made = True
        if where.user is not None or where.group is not None:
            os.chown(where.path, _or_same(where.user), _or_same(where.group))
        if where.mode is not None:
            where.path.chmod(where.mode)
        listening.listen(_BACKLOG)  # until now every attempt to connect was refused
        inode = _inode(where.path)
    except OSError:
        listening.close()
        if made:
            where.path.unlink(missing_ok=True)
        raise
    listening.setblocking(False)
    return listening, inode


def remove(path: Path, inode: Inode) -> None:
    """Take the socket away that was bound; what somebody put in its place stays."""
    with contextlib.suppress(OSError):
        if _inode(path) == inode:
            path.unlink()


def user_of(connection: socket.socket) -> int:
    """The user id of the process that connected."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def _clear(path: Path) -> None:
    """Remove a socket that its owner left behind; OSError if there is something else, or somebody still listens."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, f"{path} is there and is no socket; remove it, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog is an answer, too
        if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    path.unlink()


def _inode(path: Path) -> Inode:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _or_same(identity: int | None) -> int:
    return -1 if identity is None else identity
