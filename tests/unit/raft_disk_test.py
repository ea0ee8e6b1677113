import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caserver.raft.disk import MemoryDisk, PosixDisk
from tests.testkit.descriptors import no_more_descriptors

AnyDisk = PosixDisk | MemoryDisk


@pytest.fixture(params=["posix", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyDisk]:
    made: AnyDisk = PosixDisk(tmp_path / "data") if request.param == "posix" else MemoryDisk()
    yield made
    made.close()


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestEveryDisk:
    def test_a_file_that_was_never_written_is_none(self, disk: AnyDisk) -> None:
        assert disk.read("log") is None

    def test_appended_bytes_follow_each_other(self, disk: AnyDisk) -> None:
        disk.append("log", b"one")
        disk.append("log", b"two")
        disk.datasync("log")

        assert disk.read("log") == b"onetwo"

    def test_a_replaced_file_is_whole_and_can_be_appended_to(self, disk: AnyDisk) -> None:
        disk.append("log", b"former")
        disk.replace("log", b"new")
        disk.append("log", b"er")
        disk.datasync("log")

        assert disk.read("log") == b"newer"

    def test_a_removed_file_is_none_and_may_be_removed_again(self, disk: AnyDisk) -> None:
        disk.append("log", b"x")
        disk.replace("log", None)
        disk.replace("log", None)
        assert disk.read("log") is None

        disk.append("log", b"y")
        assert disk.read("log") == b"y"

    def test_empty_content_is_not_none(self, disk: AnyDisk) -> None:
        disk.replace("log", b"")

        assert disk.read("log") == b""


class TestPosixDisk:
    def test_only_the_owner_may_read(self, tmp_path: Path) -> None:
        disk = PosixDisk(tmp_path / "a" / "data")
        disk.append("log", b"x")
        disk.replace("snapshot", b"x")
        disk.lock()
        disk.close()

        assert mode(tmp_path / "a" / "data") == 0o700
        assert {mode(path) for path in (tmp_path / "a" / "data").iterdir()} == {0o600}

    def test_a_directory_that_everybody_may_write_to_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)

        with pytest.raises(PermissionError, match="every user may write"):
            PosixDisk(tmp_path)

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        first, second = PosixDisk(tmp_path), PosixDisk(tmp_path)
        first.lock()
        first.lock()
        with pytest.raises(BlockingIOError, match="another caserver process"):
            second.lock()
        first.close()
        second.lock()
        second.close()

    def test_a_planted_link_is_not_followed(self, tmp_path: Path) -> None:
        directory = tmp_path / "data"
        disk = PosixDisk(directory)
        (tmp_path / "target").write_text("mine")
        for name in ("log", "snapshot.new"):
            (directory / name).symlink_to(tmp_path / "target")

        for attempt in (lambda: disk.append("log", b"x"), lambda: disk.replace("snapshot", b"x")):
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.ELOOP
        with pytest.raises(OSError):
            disk.read("log")
        assert (tmp_path / "target").read_text() == "mine"

    def test_a_full_disk_is_an_error_and_leaves_the_former_file(self, tmp_path: Path) -> None:
        disk = PosixDisk(tmp_path)
        disk.replace("snapshot", b"former")
        disk.append("log", b"a" * 1000)
        with files_limited_to(4096):
            with pytest.raises(OSError):
                disk.replace("snapshot", b"b" * 10_000)
            with pytest.raises(OSError):
                disk.append("log", b"b" * 10_000)
        disk.close()

        assert disk.read("snapshot") == b"former"
        assert (disk.read("log") or b"").startswith(b"a" * 1000)

    def test_its_repr_names_the_directory(self, tmp_path: Path) -> None:
        assert str(tmp_path) in repr(PosixDisk(tmp_path))


class TestMemoryDisk:
    def test_a_power_loss_spares_what_was_synced_and_a_part_of_the_rest(self) -> None:
        disk = MemoryDisk()
        disk.append("log", b"durable")
        disk.datasync("log")
        disk.append("log", b" or not")
        disk.append("never", b"synced")
        disk.replace("snapshot", b"whole")

        lost, half = disk.after_power_loss(), disk.after_power_loss(surviving_bytes=3)
        assert [lost.read(name) for name in ("log", "never", "snapshot")] == [b"durable", None, b"whole"]
        assert [half.read(name) for name in ("log", "never", "snapshot")] == [b"durable or", b"syn", b"whole"]

    def test_one_user_at_a_time(self) -> None:
        disk = MemoryDisk()
        disk.lock()

        with pytest.raises(BlockingIOError):
            disk.lock()


def test_a_file_that_is_appended_to_can_be_replaced_without_a_descriptor_more_than_before(tmp_path: Path) -> None:
    disk = PosixDisk(tmp_path)
    disk.append("log", b"former")
    before = len(list(Path("/proc/self/fd").iterdir()))
    disk.replace("log", b"new")
    held = len(list(Path("/proc/self/fd").iterdir()))
    disk.append("log", b"er")
    disk.datasync("log")
    disk.close()

    assert held == before
    assert (tmp_path / "log").read_bytes() == b"newer"


def test_a_replacement_for_which_there_is_no_descriptor_changes_nothing(tmp_path: Path) -> None:
    disk = PosixDisk(tmp_path)
    disk.append("log", b"former")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            disk.replace("log", b"new")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    disk.append("log", b" content")
    disk.close()

    assert (tmp_path / "log").read_bytes() == b"former content"


def test_files_are_replaced_and_read_although_others_took_every_descriptor(tmp_path: Path) -> None:
    disk = PosixDisk(tmp_path)
    disk.append("log", b"former")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with no_more_descriptors():
        for number in range(3):
            disk.replace("log", b"new %d" % number)
            disk.replace("marker", b"%d" % number)
            assert disk.read("marker") == b"%d" % number
        disk.append("log", b"er")
        disk.datasync("log")
    held = len(list(Path("/proc/self/fd").iterdir()))
    disk.close()

    assert held == before
    assert (tmp_path / "log").read_bytes() == b"new 2er"
    assert len(list(Path("/proc/self/fd").iterdir())) < before


def flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed from here on, by name."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def test_a_new_directory_is_durable_in_those_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = flushes(monkeypatch)
    PosixDisk(tmp_path / "new" / "data").close()
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "new")]
    PosixDisk(tmp_path / "new" / "data").close()
    assert len(synced) == 2


def test_a_file_that_was_renamed_before_a_crash_is_durable_under_its_name_before_anything_rests_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may have died between the rename and the flush of the directory."""
    disk = PosixDisk(tmp_path)
    disk.replace("log", b"new")
    disk.close()
    synced = flushes(monkeypatch)
    successor = PosixDisk(tmp_path)
    successor.datasync("log")
    assert synced == [str(tmp_path)]
    successor.append("log", b"er")
    successor.datasync("log")
    assert synced == [str(tmp_path)]
    successor.close()
