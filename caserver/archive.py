"""Snapshots as files, in the format of Consul's: a gzipped tar of ``meta.json``, ``state.bin`` and ``SHA256SUMS``.

A stock Consul client saves, verifies and restores such a file without knowing what is in ``state.bin``: there, our own
encoded state rides in records that Consul's tools count as of a type unknown to them. ``meta.json`` carries what Consul
writes and one key more, the ``Seal``: the state's hash, sealed with the cluster secret, so that nobody without that secret
can make or alter a snapshot that would be restored.

Reading trusts nothing: sizes are bounded before anything is held, names are exactly three, every byte is accounted for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO, Protocol

from caserver.errors import InvalidArchive
from caserver.internode.keyring import Sealed

VERSION = 1  # of Consul's meta.json
ARCHIVE_MAX = 128 << 20  # bytes, compressed
STATE_MAX = 256 << 20  # bytes of state.bin
_SMALL_MAX = 64 << 10  # bytes of meta.json, and of SHA256SUMS
_META, _STATE, _SUMS = "meta.json", "state.bin", "SHA256SUMS"
_LIMITS = {_META: _SMALL_MAX, _STATE: STATE_MAX, _SUMS: _SMALL_MAX}
_BLOCK = 512  # bytes of tar
_READ = 64 << 10
_LEVEL = 6
# Magic, deflate, no flags, no time, no hint, unknown system: what Go's writer begins with, too.
_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_GZIP_TAIL = struct.Struct("<II")
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._]+)")
# Of Consul's state.bin: a msgpack map {"LastIndex": n}, then records of one byte for the type and a msgpack value. No
# version of Consul writes our type, so that it refuses to restore what is ours.
_LAST_INDEX = b"\x81\xa9LastIndex"
_UINT64, _STR32 = b"\xcf", b"\xdb"
_RECORD = 100


@dataclass(frozen=True, slots=True)
class Server:
    """One server of the cluster that a snapshot is of."""

    id: str
    address: str  # host:port of Raft


@dataclass(frozen=True, slots=True)
class Meta:
    """What a snapshot says of itself."""

    id: str
    index: int
    term: int
    size: int  # bytes of state.bin
    version: int = VERSION
    servers: tuple[Server, ...] = ()
    seal: Sealed | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Content:
    """A verified snapshot with its state."""

    meta: Meta
    state: bytes = field(repr=False)  # as the codec of states wrote it


class Making:
    """A snapshot being made: ``advance`` until it says that there is no more, then ``finish``.

    The state is compressed as it comes and kept so, because its size stands before it.
    """

    def __init__(self, slices: Iterable[bytes], *, index: int) -> None:
        """``slices`` are what the codec makes of the state, in a few milliseconds' work each."""
        self._slices = iter(slices)
        self._state = _Member()
        self._state_hash = hashlib.sha256()  # of the state alone: what is sealed
        self._file_hash = hashlib.sha256()
        self._index = index
        self._add(_LAST_INDEX + _UINT64 + struct.pack(">Q", index))

    def advance(self) -> bool:
        """Take one slice more; False when there are none."""
        piece = next(self._slices, None)
        if piece is None:
            return False
        if piece:
            self._state_hash.update(piece)
            self._add(bytes((_RECORD,)) + _STR32 + struct.pack(">I", len(piece)) + piece)
        return True

    @property
    def state_hash(self) -> bytes:
        """SHA-256 of the state, to be sealed."""
        return self._state_hash.digest()

    def finish(self, *, term: int, servers: Iterable[Server], seal: Sealed, now: datetime) -> list[bytes]:
        """The whole archive in pieces."""
        size, at = self._state.size, int(now.timestamp())
        meta = Meta(
            id=f"{term}-{self._index}-{int(now.timestamp() * 1000)}",
            index=self._index,
            term=term,
            size=size,
            servers=tuple(servers),
            seal=seal,
        )
        described = _encode_meta(meta)
        digests = {_META: hashlib.sha256(described).hexdigest(), _STATE: self._file_hash.hexdigest()}
        sums = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
        before, after = _Member(), _Member()
        before.add(_tar_file(_META, described, at) + _tar_head(_STATE, size, at))
        after.add(_padding(size) + _tar_file(_SUMS, sums, at) + bytes(2 * _BLOCK))
        return [*before.finish(), *self._state.finish(), *after.finish()]

    def _add(self, piece: bytes) -> None:
        self._file_hash.update(piece)
        self._state.add(piece)


class _Member:
    """One member of a gzip file; several in a row are one file."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._made, self._checksum = [_GZIP_HEAD], 0
        self.size = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._checksum = zlib.crc32(piece, self._checksum)
        self._made.append(self._deflate.compress(piece))

    def finish(self) -> list[bytes]:
        tail = _GZIP_TAIL.pack(self._checksum, self.size & 0xFFFFFFFF)
        return [each for each in (*self._made, self._deflate.flush(), tail) if each]


def read_meta(source: BinaryIO) -> Meta:
    """Verify a snapshot of caserver or of Consul as a file, without looking into its state; InvalidArchive."""
    return _read(source, _Hashing())


def read(source: BinaryIO) -> Content:
    """Verify a snapshot of caserver; InvalidArchive names what is wrong with it and what to do."""
    state = _Unwrapping()
    meta = _read(source, state)
    return Content(meta, state.content())


class _Sink(Protocol):
    """What ``state.bin`` is read into."""

    def add(self, piece: bytes) -> None: ...

    def digest(self) -> str: ...


class _Hashing:
    """Keeps the sum of a file only."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        self._hash.update(piece)

    def digest(self) -> str:
        return self._hash.hexdigest()


class _Unwrapping(_Hashing):
    """Keeps the whole file."""

    def __init__(self) -> None:
        super().__init__()
        self._file = io.BytesIO()

    def add(self, piece: bytes) -> None:
        super().add(piece)
        self._file.write(piece)

    def content(self) -> bytes:
        """The state in the records; InvalidArchive for records that are not ours."""
        return b"".join(_records(self._file.getbuffer()))


def _read(source: BinaryIO, state: _Sink) -> Meta:
    texts: dict[str, _Kept] = {_META: _Kept(), _SUMS: _Kept()}
    sinks: Mapping[str, _Sink] = {_STATE: state, **texts}
    sizes: dict[str, int] = {}
    plain = _Plain(source)
    while (found := _tar_entry(plain.take(_BLOCK))) is not None:
        name, size = found
        if name in sizes:
            raise InvalidArchive(f"the snapshot holds {name} twice: it is damaged, take another one")
        sizes[name] = size
        for piece in plain.pieces(size):
            sinks[name].add(piece)
        if any(plain.take(len(_padding(size)))):
            raise _damaged(f"something lies behind {name}")
    if any(plain.take(_BLOCK)) or plain.more():
        raise _damaged("something lies behind its end")
    missing = [name for name in sinks if name not in sizes]
    if missing:
        raise InvalidArchive(f"the snapshot holds no {', no '.join(missing)}: it is no snapshot, or not all of one")
    _check_sums(texts[_SUMS].text(), {name: sinks[name].digest() for name in (_META, _STATE)})
    meta = _decode_meta(texts[_META].text())
    if meta.size != sizes[_STATE]:
        raise _damaged(f"{_META} speaks of {meta.size} bytes of state, {sizes[_STATE]} are there")
    return meta


class _Kept(_Hashing):
    """Keeps a small file."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        super().add(piece)
        self._pieces.append(piece)

    def text(self) -> str:
        try:
            return b"".join(self._pieces).decode()
        except UnicodeDecodeError as exc:
            raise _damaged("a text of it is not UTF-8") from exc


class _Plain:
    """The decompressed bytes of a gzip file, never more of them at once than are asked for."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._inflate: Any = None  # zlib's decompressor, which has no name to annotate with
        self._checksum = self._size = 0
        self._waiting = b""  # compressed

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes; InvalidArchive if there are not as many."""
        return b"".join(self.pieces(count))

    def pieces(self, count: int) -> Iterator[bytes]:
        """Exactly ``count`` bytes, in pieces."""
        while count:
            piece = self._some(min(count, _READ))
            if not piece:
                raise _cut_short()
            count -= len(piece)
            yield piece

    def more(self) -> bool:
        """Whether anything follows."""
        return bool(self._some(1))

    def _some(self, most: int) -> bytes:
        """Up to ``most`` bytes; nothing at the end of the last member."""
        while True:
            if self._inflate is None and not self._begin():
                return b""
            piece = self._inflated(most)
            if piece:
                return piece

    def _begin(self) -> bool:
        """Open the next member; False if there is none."""
        head = self._raw(len(_GZIP_HEAD))
        if not head:
            return False
        if head != _GZIP_HEAD:
            raise InvalidArchive(
                "the snapshot is not compressed as snapshots are: this is another file, or one that was damaged or "
                "compressed anew; give the file as it was saved"
            )
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._checksum = self._size = 0
        return True

    def _inflated(self, most: int) -> bytes:
        inflate = self._inflate
        if not self._waiting:
            self._waiting = self._source.read(_READ)
            if not self._waiting:
                raise _cut_short()
        try:
            piece: bytes = inflate.decompress(self._waiting, most)
        except zlib.error as exc:
            raise _damaged("it cannot be decompressed") from exc
        self._waiting = inflate.unconsumed_tail
        self._checksum = zlib.crc32(piece, self._checksum)
        self._size += len(piece)
        if inflate.eof:
            self._waiting = inflate.unused_data
            self._end()
        return piece

    def _end(self) -> None:
        """Close a member: what was decompressed must be what was compressed."""
        self._inflate = None
        tail = self._raw(_GZIP_TAIL.size)
        if len(tail) < _GZIP_TAIL.size:
            raise _cut_short()
        if _GZIP_TAIL.unpack(tail) != (self._checksum, self._size & 0xFFFFFFFF):
            raise _damaged("its checksum does not fit")

    def _raw(self, count: int) -> bytes:
        """Up to ``count`` bytes as they are in the file."""
        while len(self._waiting) < count and (piece := self._source.read(_READ)):
            self._waiting += piece
        found, self._waiting = self._waiting[:count], self._waiting[count:]
        return found


def _tar_entry(block: bytes) -> tuple[str, int] | None:
    """Name and size of the file that follows; None at the end of the archive."""
    if not any(block):
        return None
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as exc:
        raise _damaged("a file's heading cannot be read") from exc
    if entry.name not in _LIMITS or not entry.isreg():
        raise InvalidArchive(
            f"the snapshot holds {entry.name[:100]!r}; a snapshot holds the plain files {', '.join(_LIMITS)} and nothing else"
        )
    if not 0 <= entry.size <= _LIMITS[entry.name]:
        raise InvalidArchive(f"{entry.name} has {entry.size} bytes, at most {_LIMITS[entry.name]} are taken")
    return entry.name, entry.size


def _check_sums(sums: str, found: Mapping[str, str]) -> None:
    said: dict[str, str] = {}
    for line in sums.splitlines():
        match = _SUM_LINE.fullmatch(line)
        if match is None or match[2] in said:
            raise _damaged(f"{_SUMS} cannot be read")
        said[match[2]] = match[1]
    for name, digest in found.items():
        if said.get(name) != digest:
            raise _damaged(f"the sum of {name} does not fit")
    if len(said) != len(found) or not sums.endswith("\n"):
        raise _damaged(f"{_SUMS} cannot be read")


def _records(file: memoryview) -> Iterator[bytes]:
    """The values of our records in ``state.bin``."""
    place = len(_LAST_INDEX) + len(_UINT64) + 8
    if bytes(file[: len(_LAST_INDEX)]) != _LAST_INDEX:
        raise InvalidArchive("the snapshot's state is neither caserver's nor Consul's: give a file that caserver saved")
    if bytes(file[len(_LAST_INDEX) : place - 8]) != _UINT64 or bytes(file[place : place + 1]) != bytes((_RECORD,)):
        raise InvalidArchive(
            "this is a snapshot of Consul itself, which caserver does not restore; to go on with a CA of Consul, found a "
            "new cluster with its root certificate, private key and cluster id in ca_config"
        )
    heading = 1 + len(_STR32) + 4
    while place < len(file):
        opening = bytes(file[place : place + heading])
        if opening[: 1 + len(_STR32)] != bytes((_RECORD,)) + _STR32 or len(opening) < heading:
            raise _damaged(f"{_STATE} holds a record that caserver did not write")
        (length,) = struct.unpack(">I", opening[-4:])
        place += heading
        if place + length > len(file):
            raise _damaged(f"{_STATE} ends within a record")
        yield bytes(file[place : place + length])
        place += length


def _encode_meta(meta: Meta) -> bytes:
    """As Consul writes it: the peers twice, once in the way of old."""
    addresses = [each.address.encode() for each in meta.servers]
    peers = b"\xdc" + struct.pack(">H", len(addresses))
    peers += b"".join(b"\xda" + struct.pack(">H", len(each)) + each for each in addresses)
    document = {
        "Version": meta.version,
        "ID": meta.id,
        "Index": meta.index,
        "Term": meta.term,
        "Peers": base64.b64encode(peers).decode(),
        "Configuration": {
            "Servers": [{"Suffrage": 0, "ID": each.id, "Address": each.address} for each in meta.servers]
        },
        "ConfigurationIndex": 1,
        "Size": meta.size,
        "Seal": base64.b64encode(meta.seal or b"").decode(),
    }
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _decode_meta(text: str) -> Meta:
    try:
        document = json.loads(text)
        named, version, numbers = (
            document["ID"],
            document["Version"],
            [document[name] for name in ("Index", "Term", "Size")],
        )
        seal = base64.b64decode(document.get("Seal", ""), validate=True)
        given = document["Configuration"]["Servers"]
        servers = tuple(Server(str(each["ID"]), str(each["Address"])) for each in given)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as exc:
        raise InvalidArchive(f"{_META} of the snapshot cannot be read: {type(exc).__name__}; take another one") from exc
    if not isinstance(named, str) or not all(type(each) is int for each in (version, *numbers)):
        raise InvalidArchive(f"{_META} of the snapshot holds a value of another type; take another one")
    if version != VERSION:
        raise InvalidArchive(
            f"the snapshot has version {version}, this build reads {VERSION}; use the caserver version that saved it"
        )
    index, term, size = numbers
    return Meta(
        id=named,
        index=index,
        term=term,
        size=size,
        version=version,
        servers=servers,
        seal=Sealed(seal) if seal else None,
    )


def _tar_head(name: str, size: int, at: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, at
    return entry.tobuf(tarfile.USTAR_FORMAT)


def _tar_file(name: str, content: bytes, at: int) -> bytes:
    return _tar_head(name, len(content), at) + content + _padding(len(content))


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _damaged(why: str) -> InvalidArchive:
    return InvalidArchive(f"the snapshot is damaged: {why}; take another one")


def _cut_short() -> InvalidArchive:
    return InvalidArchive("the snapshot is cut short: it was not saved or copied whole; take another one")
