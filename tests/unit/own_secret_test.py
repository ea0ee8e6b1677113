import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from caserver.errors import Corrupt
from caserver.own_secret import SECRET_FILE, own_secret
from caserver.raft.disk import PosixDisk
from tests.testkit.fakes import SeededEntropy


class Interrupted(SeededEntropy):
    """Runs something else in the middle of a start."""

    def __init__(self, other: Callable[[], object]) -> None:
        super().__init__()
        self._other = other

    def bytes(self, count: int) -> bytes:
        self._other()
        return super().bytes(count)


def stored(directory: Path) -> bytes:
    return base64.b64decode((directory / SECRET_FILE).read_text())


def test_a_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = own_secret(data, SeededEntropy())

    assert own_secret(data, SeededEntropy(2)) == made == stored(data)
    assert (data / SECRET_FILE).stat().st_mode & 0o777 == 0o600


def test_of_two_starts_at_the_same_time_one_makes_the_secret(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(BlockingIOError) as caught:
            own_secret(tmp_path, SeededEntropy(2))
        refused.append(str(caught.value))

    used = own_secret(tmp_path, Interrupted(second))

    assert used == stored(tmp_path)
    assert "another caserver process uses the data directory" in refused[0]


def test_a_start_beside_a_running_node_does_not_even_look(tmp_path: Path) -> None:
    made = own_secret(tmp_path, SeededEntropy())
    running = PosixDisk(tmp_path)
    running.lock()
    try:
        with pytest.raises(BlockingIOError, match="another caserver process uses the data directory"):
            own_secret(tmp_path, SeededEntropy(2))
    finally:
        running.close()

    assert own_secret(tmp_path, SeededEntropy(2)) == made


@pytest.mark.parametrize("left", ["lost+found/", "cluster_secret.new", "lock"])
def test_what_is_no_data_does_not_stand_in_the_way(tmp_path: Path, left: str) -> None:
    if left.endswith("/"):
        (tmp_path / left).mkdir()
    else:
        (tmp_path / left).write_bytes(b"half")

    assert own_secret(tmp_path, SeededEntropy()) == stored(tmp_path)


@pytest.mark.parametrize("held", ["node.json", "raft.log", "snapshot", "node.json.old", "raft.log.old", "snapshot.old"])
def test_data_without_its_secret_is_refused(tmp_path: Path, held: str) -> None:
    (tmp_path / held).write_bytes(b"{}")

    with pytest.raises(Corrupt, match=f"cluster_secret is missing, but {tmp_path} holds {held}.*backup"):
        own_secret(tmp_path, SeededEntropy())
    assert not (tmp_path / SECRET_FILE).exists()


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / SECRET_FILE).write_text("c2hvcnQ=\n")

    with pytest.raises(Corrupt, match="restore the file from a backup"):
        own_secret(tmp_path, SeededEntropy())
