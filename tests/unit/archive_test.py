"""Snapshot files: what is written can be read, by Consul's rules too, and anything else is refused."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import random
import re
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from caserver import archive
from caserver.archive import Content, Making, Server, read, read_meta
from caserver.errors import InvalidArchive
from caserver.internode.keyring import Sealed

NOW = datetime(2026, 11, 23, 12, 0, 0, 250_000, tzinfo=UTC)
SLICES = [b'["caserver-state",1,100]\n', b"", b'{"head":1}\n', b'["end",2]\n']
SERVERS = (Server("n1", "10.0.0.1:8300"), Server("n2", "[::1]:8300"))
SEAL = Sealed(b"s" * 60)
CONSULS = Path(__file__).parents[1] / "contract" / "data" / "consul-snapshot.tgz"


def made(slices: list[bytes] = SLICES, *, seal: Sealed = SEAL) -> bytes:
    making = Making(slices, index=31)
    while making.advance():
        pass
    return b"".join(making.finish(term=2, servers=SERVERS, seal=seal, now=NOW))


def content(data: bytes) -> Content:
    return read(io.BytesIO(data))


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidArchive) as caught:
        content(data)
    return caught.value.detail


def members(data: bytes) -> dict[str, bytes]:
    """The files of an archive, as anybody's tar reads them."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def packed(files: list[tuple[str, bytes]], **changes: object) -> bytes:
    """An archive of these files, made as ours are but by the standard library."""
    plain = io.BytesIO()
    for name, body in files:
        entry = tarfile.TarInfo(name)
        entry.size = len(body)
        for key, value in changes.items():
            setattr(entry, key, value)
        plain.write(entry.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512))
    return compressed(plain.getvalue() + bytes(1024))


def compressed(plain: bytes) -> bytes:
    member = archive._Member()
    member.add(plain)
    return b"".join(member.finish())


def resummed(meta: bytes, state: bytes) -> list[tuple[str, bytes]]:
    digests = {"meta.json": meta, "state.bin": state}
    sums = "".join(f"{hashlib.sha256(body).hexdigest()}  {name}\n" for name, body in digests.items())
    return [("meta.json", meta), ("state.bin", state), ("SHA256SUMS", sums.encode())]


def with_meta(**changes: object) -> bytes:
    found = members(made())
    document = json.loads(found["meta.json"]) | changes
    return packed(resummed(json.dumps(document).encode(), found["state.bin"]))


def test_what_is_made_can_be_read():
    found = content(made())

    assert found.state == b"".join(SLICES)
    assert (found.meta.index, found.meta.term, found.meta.version) == (31, 2, 1)
    assert found.meta.servers == SERVERS
    assert found.meta.seal == SEAL
    assert found.meta == read_meta(io.BytesIO(made()))


def test_it_is_what_consul_writes():
    files = members(made())
    meta = json.loads(files["meta.json"])

    assert list(files) == ["meta.json", "state.bin", "SHA256SUMS"]
    assert list(meta) == [*json.loads(members(CONSULS.read_bytes())["meta.json"]), "Seal"]
    assert meta["ID"] == "2-31-1795435200250"
    assert meta["Size"] == len(files["state.bin"])
    assert re.fullmatch(rb"([0-9a-f]{64}  [a-zA-Z0-9.]+\n){2}", files["SHA256SUMS"])
    assert base64.b64decode(meta["Peers"]) == b"\xdc\x00\x02\xda\x00\x0d10.0.0.1:8300\xda\x00\x0a[::1]:8300"
    # Consul's reader wants the compressed stream to end with the two empty blocks that end a tar.
    assert len(gzip.decompress(made())) == sum(512 + len(body) + -len(body) % 512 for body in files.values()) + 1024


def test_its_files_are_the_owners_alone():
    with tarfile.open(fileobj=io.BytesIO(made()), mode="r:gz") as tar:
        assert {entry.mode for entry in tar} == {0o600}


def test_the_records_are_msgpack_of_a_type_that_consul_does_not_know():
    state = members(made())["state.bin"]

    assert state.startswith(b"\x81\xa9LastIndex\xcf" + (31).to_bytes(8, "big"))
    assert state[20:].startswith(bytes((100, 0xDB)) + len(SLICES[0]).to_bytes(4, "big") + SLICES[0])


def test_a_large_state_is_read_in_pieces():
    chance = random.Random(5)
    slices = [chance.randbytes(chance.randrange(200_000)) for _ in range(30)]

    assert content(made(slices)).state == b"".join(slices)


def test_a_snapshot_of_consul_can_be_looked_at_and_is_not_restored():
    data = CONSULS.read_bytes()

    assert (read_meta(io.BytesIO(data)).index, read_meta(io.BytesIO(data)).seal) == (31, None)
    assert "a snapshot of Consul itself" in refusal(data)
    assert "found a new cluster with its root certificate" in refusal(data)


def test_every_damaged_byte_is_noticed():
    data = made()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        with pytest.raises(InvalidArchive):
            content(bytes(damaged))


def test_no_damaged_bit_changes_what_is_read():
    data, chance = made(), random.Random(7)
    expected = content(data)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            found = content(bytes(damaged))
        except InvalidArchive:
            continue
        assert found == expected  # a bit that stands for nothing: the filling of the last byte of compressed data


def test_every_cut_is_noticed():
    data = made()
    for length in range(len(data)):
        with pytest.raises(InvalidArchive):
            content(data[:length])


@pytest.mark.parametrize("more", [b"\0", b"x", b"\x1f\x8b", bytes(512)])
def test_nothing_may_follow(more: bytes):
    assert "not compressed as snapshots are" in refusal(made() + more) or "cut short" in refusal(made() + more)
    assert "something lies behind its end" in refusal(made() + compressed(b"more"))


@pytest.mark.parametrize("data", [b"", b"hello", b"\x1f\x8b", gzip.compress(b"hello"), b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(data: bytes):
    assert refusal(data)


def test_what_was_compressed_anew_is_refused_with_the_reason():
    assert "compressed anew" in refusal(gzip.compress(gzip.decompress(made())))


@pytest.mark.parametrize("name", ["../meta.json", "/etc/passwd", "./meta.json", "meta.json/", "state.bin\n", "a" * 99])
def test_other_names_are_refused(name: str):
    files = members(made())
    assert "plain files" in refusal(packed([(name, b"x"), *files.items()]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.XHDTYPE])
def test_other_kinds_of_files_are_refused(kind: bytes):
    assert "plain files" in refusal(packed([("meta.json", b"")], type=kind, linkname="/etc/passwd"))


def test_a_file_may_not_come_twice_nor_be_missing():
    files = list(members(made()).items())

    assert "meta.json twice" in refusal(packed([files[0], *files]))
    for name, _ in files:
        assert f"no {name}" in refusal(packed([each for each in files if each[0] != name]))


def test_a_bomb_is_refused_before_it_is_unpacked():
    head = tarfile.TarInfo("state.bin")
    head.size = archive.STATE_MAX + 1

    assert "at most" in refusal(compressed(head.tobuf(tarfile.USTAR_FORMAT) + bytes(10 << 20)))


@pytest.mark.parametrize("name", ["meta.json", "SHA256SUMS"])
def test_small_files_are_small(name: str):
    assert f"{name} has 100000 bytes" in refusal(packed([(name, bytes(100_000))]))


def test_sums_must_fit():
    files = members(made())
    for sums in (
        b"",
        files["SHA256SUMS"].splitlines(keepends=True)[0],
        files["SHA256SUMS"] + files["SHA256SUMS"],
        files["SHA256SUMS"] + b"0" * 64 + b"  other\n",
        files["SHA256SUMS"].rstrip(),
        files["SHA256SUMS"].upper(),
        b"\xff\n",
    ):
        assert "damaged" in refusal(packed([*list(files.items())[:2], ("SHA256SUMS", sums)]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Version": 2}, "version 2, this build reads 1"),
        ({"Version": "1"}, "another type"),
        ({"ID": 5}, "another type"),
        ({"Index": None}, "another type"),
        ({"Term": 1.5}, "another type"),
        ({"Size": 5}, "speaks of 5 bytes"),
        ({"Seal": "?"}, "cannot be read"),
        ({"Configuration": None}, "cannot be read"),
    ],
)
def test_what_it_says_of_itself_must_fit(changes: dict[str, object], reason: str):
    assert reason in refusal(with_meta(**changes))


@pytest.mark.parametrize("name", ["Version", "ID", "Index", "Term", "Size", "Configuration"])
def test_what_it_must_say_of_itself_must_be_there(name: str):
    files = members(made())
    meta = json.loads(files["meta.json"])
    del meta[name]
    assert "cannot be read" in refusal(packed(resummed(json.dumps(meta).encode(), files["state.bin"])))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b"[" * 20_000, b"\xff"])
def test_what_it_says_of_itself_must_be_readable(text: bytes):
    state = members(made())["state.bin"]
    assert refusal(packed(resummed(text, state)))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (b"", "neither caserver's nor Consul's"),
        (b"x" * 50, "neither caserver's nor Consul's"),
        (b"\x81\xa9LastIndex\xcf" + bytes(8) + b"\x00", "of Consul itself"),
        (b"\x81\xa9LastIndex\x1a\x00\x8d", "of Consul itself"),
        (b"\x81\xa9LastIndex\xcf" + bytes(8) + b"\x64\xdb\x00\x00\x00\x09short", "ends within a record"),
        (b"\x81\xa9LastIndex\xcf" + bytes(8) + b"\x64\xdb\x00\x00\x00\x01x\x05rest", "did not write"),
        (b"\x81\xa9LastIndex\xcf" + bytes(8) + b"\x64\xdb\x00", "did not write"),
    ],
)
def test_foreign_states_are_refused(state: bytes, reason: str):
    meta = json.dumps(json.loads(members(made())["meta.json"]) | {"Size": len(state)}).encode()
    assert reason in refusal(packed(resummed(meta, state)))


def test_random_bytes_are_refused():
    chance = random.Random(11)
    for _ in range(200):
        with pytest.raises(InvalidArchive):
            content(archive._GZIP_HEAD + chance.randbytes(chance.randrange(2000)))


def test_nothing_secret_is_shown():
    assert "s" * 20 not in repr(content(made()))
