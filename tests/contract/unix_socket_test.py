from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from caserver import unix_socket
from caserver.unix_socket import UnixSocket


def test_a_socket_has_its_mode_before_anybody_can_connect(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listening, _ = unix_socket.bound(UnixSocket(path, mode=0o660, user=os.getuid(), group=os.getgid()))
    with listening:
        found = path.stat()

    assert stat.S_IMODE(found.st_mode) == 0o660
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())


def test_what_a_killed_agent_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    unix_socket.bound(UnixSocket(path))[0].close()

    listening, _ = unix_socket.bound(UnixSocket(path))
    with listening, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        connection, _ = listening.accept()
        with connection:
            assert unix_socket.user_of(connection) == os.getuid()


def test_a_socket_that_somebody_serves_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listening, _ = unix_socket.bound(UnixSocket(path))
    with listening, pytest.raises(OSError, match="in use") as caught:
        unix_socket.bound(UnixSocket(path))

    assert caught.value.errno == errno.EADDRINUSE
    assert path.is_socket()


def test_a_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")

    with pytest.raises(FileExistsError, match="is there and is no socket"):
        unix_socket.bound(UnixSocket(path))

    assert path.read_text() == "precious"


@pytest.mark.skipif(os.getuid() == 0, reason="root may give a file to anybody")
def test_an_owner_that_may_not_be_given_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "s"

    with pytest.raises(PermissionError):
        unix_socket.bound(UnixSocket(path, user=0))

    assert not path.exists()


def test_only_the_own_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, old = unix_socket.bound(UnixSocket(path))
    first.close()
    second, new = unix_socket.bound(UnixSocket(path))
    second.close()

    if old != new:  # an inode number may be used again
        unix_socket.remove(path, old)
        assert path.is_socket()
    unix_socket.remove(path, new)
    unix_socket.remove(path, new)

    assert not path.exists()
