import hashlib
import json

import pytest

from caserver.errors import Corrupt
from caserver.raft import snapshot_file
from caserver.raft.disk import MemoryDisk
from caserver.raft.journal import Entry

PREVIOUS, LAST = (b"\x00one", 8, 2), (b"\x00two\xff", 9, 3)
SLICES = (b"sta", b"", b"te")


def written(*, previous: Entry = PREVIOUS, last: Entry = LAST) -> MemoryDisk:
    disk = MemoryDisk()
    snapshot_file.write(disk, previous=previous, last=last, slices=SLICES)
    return disk


def content() -> bytes:
    return written().read(snapshot_file.SNAPSHOT_FILE) or b""


def resealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def test_what_was_written_is_read_back_after_a_power_loss() -> None:
    snapshot = snapshot_file.read(written().after_power_loss())

    assert snapshot == snapshot_file.Snapshot(
        previous=PREVIOUS, last=LAST, state=b"state", state_hash=hashlib.sha256(b"state").hexdigest()
    )


def test_no_file_is_no_snapshot() -> None:
    assert snapshot_file.read(MemoryDisk()) is None


def test_the_same_state_gives_the_same_bytes_however_it_is_sliced() -> None:
    whole = snapshot_file.encode(previous=PREVIOUS, last=LAST, slices=[b"state"])

    assert whole == content()


def test_no_flipped_bit_is_read() -> None:
    intact = content()
    for at in range(len(intact)):
        with pytest.raises(Corrupt):
            snapshot_file.decode(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])


def test_no_shortened_or_lengthened_file_is_read() -> None:
    intact = content()
    for damaged in (*(intact[:size] for size in range(len(intact))), intact + b"x"):
        with pytest.raises(Corrupt):
            snapshot_file.decode(damaged)


def test_a_damaged_file_says_what_to_do() -> None:
    disk = MemoryDisk()
    disk.replace(snapshot_file.SNAPSHOT_FILE, content()[:-1])

    with pytest.raises(Corrupt, match="-rejoin"):
        snapshot_file.read(disk)


def test_a_later_format_names_itself() -> None:
    intact = content()[:-32]

    with pytest.raises(Corrupt, match="has format 2"):
        snapshot_file.decode(resealed(intact.replace(b'"format":1', b'"format":2')))


@pytest.mark.parametrize("header", [b"[]", b"{}", b"{nope", json.dumps({"format": 1, "previous": 3}).encode()])
def test_a_header_of_nonsense_is_refused(header: bytes) -> None:
    with pytest.raises(Corrupt, match="header"):
        snapshot_file.decode(resealed(b"CASNAP01" + len(header).to_bytes(4) + header + b"state"))


def test_entries_that_do_not_follow_each_other_are_refused() -> None:
    disk = written(last=(b"\x00", 11, 3))

    with pytest.raises(Corrupt, match="contradicts itself"):
        snapshot_file.read(disk)


def test_its_repr_does_not_hold_the_state() -> None:
    assert "b'state'" not in repr(snapshot_file.read(written()))
