"""The secret of a node that was given none: a single node makes it at its first start and keeps it beside its data.

It opens the keys of the CA, so it is never made anew beside data, and of two starts at the same time only one makes it.
"""

from __future__ import annotations

import base64
from pathlib import Path

from caserver.environment import Entropy
from caserver.errors import Corrupt
from caserver.internode.keyring import SECRET_BYTES, decode_secret
from caserver.raft.data_dir import DATA_FILES
from caserver.raft.disk import PosixDisk

SECRET_FILE = "cluster_secret"  # noqa: S105 - the name of a file


def own_secret(data_dir: Path, entropy: Entropy) -> bytes:
    """The secret in ``data_dir``, made and durable on return if this is the first start there.

    Corrupt, with the remedy, if it cannot be read or is missing beside data; OSError if another process uses
    the directory.
    """
    disk = PosixDisk(data_dir)
    try:
        disk.lock()  # before the first look: what is not there yet, another start may be making
        found = _read(data_dir)
        return _made(data_dir, disk, entropy) if found is None else found
    finally:
        disk.close()


def _read(data_dir: Path) -> bytes | None:
    path = data_dir / SECRET_FILE
    try:
        return decode_secret(path.read_text().strip())
    except FileNotFoundError:
        return None
    except ValueError as exc:
        raise Corrupt(f"{path}: {exc}; restore the file from a backup, it opens the CA keys of this node") from exc


def _made(data_dir: Path, disk: PosixDisk, entropy: Entropy) -> bytes:
    held = sorted(name for name in DATA_FILES if (data_dir / name).exists())
    if held:
        raise Corrupt(
            f"{data_dir / SECRET_FILE} is missing, but {data_dir} holds {', '.join(held)}, which only it opens; restore it "
            "from a backup"
        )
    secret = entropy.bytes(SECRET_BYTES)
    disk.replace(SECRET_FILE, base64.b64encode(secret) + b"\n")
    return secret
