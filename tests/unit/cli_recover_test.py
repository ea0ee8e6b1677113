from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from caserver.cli import main
from caserver.internode.keyring import Keyring
from caserver.raft.data_dir import MARKER_FILE, Marker
from caserver.raft.disk import PosixDisk
from caserver.raft.journal import Journal
from caserver.state.commands import Bootstrap
from caserver.state.machine import CAStateMachine
from tests.testkit.states import stored

CLUSTER = "11111111-0000-4000-8000-000000000000"
SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))


def no_fault(error: OSError) -> None:
    raise AssertionError(error)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The directory of the stopped node n1 of n1, n2, n3, with a bootstrapped state."""
    disk = PosixDisk(tmp_path / "n1")
    disk.replace(MARKER_FILE, replace(Marker.of("n1", ("n1", "n2", "n3")), initialised=True).encode())
    journal = Journal(disk, on_fault=no_fault)
    journal.setCurrentTerm(3, "n1")
    sealed = Keyring([SECRET]).seal(b"key", purpose="hmac", nonce=bytes(12))
    command = Bootstrap(at=1_700_000_000, cluster_id=CLUSTER, configuration=stored(), sealed_hmac_key=sealed)
    for index, entry in enumerate((b"\x01", b"\x01", b"\x00" + CAStateMachine().encode(command)), start=1):
        journal.add(entry, index, 0 if index == 1 else 3)
    journal.sync()
    disk.close()
    return tmp_path / "n1"


def config(tmp_path: Path, node: str, secret: bytes = SECRET) -> str:
    peers = {name: {"address": f"10.0.0.{name[1]}"} for name in ("n1", "n4")}
    text = base64.b64encode(secret).decode()
    given = {"node_name": node, "data_dir": str(tmp_path / node), "cluster_secret": text, "peer": peers}
    file = tmp_path / f"{node}.json"
    file.write_text(json.dumps({**given, "connect": {"enabled": True}}))
    return f"-config-file={file}"


def test_what_is_exported_is_imported(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "n1.export"

    assert main(["operator", "recover", "export", f"-data-dir={data_dir}", f"-out={file}"], {}) == 0
    said = capsys.readouterr().out
    assert "Node n1 of n1, n2, n3" in said
    assert "generation 0, log up to entry 3 of term 3" in said
    assert file.stat().st_mode & 0o777 == 0o600

    command = ["operator", "recover", "import", config(tmp_path, "n4"), str(file)]
    assert main(command, {}) == 1
    assert "1 of 3 nodes are exported" in capsys.readouterr().err
    assert not (tmp_path / "n4").exists()

    assert main([*command[:-1], "-survivor", str(file)], {}) == 0
    heard = capsys.readouterr()
    assert "Node n4 of n1, n4 begins generation 1:" in heard.out
    assert "WARNING: only 1 of the 3 old nodes are known" in heard.err
    assert main([*command[:-1], "-survivor", str(file)], {}) == 0
    assert "nothing was changed" in capsys.readouterr().out
    disk = PosixDisk(tmp_path / "n4")
    assert Marker.decode(disk.read(MARKER_FILE) or b"").members == ("n1", "n4")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write files for another user")
def test_what_root_exports_and_imports_stays_with_the_user_of_the_agent(data_dir: Path, tmp_path: Path) -> None:
    user = 65534
    os.chown(data_dir, user, user)
    file = tmp_path / "n1.export"
    main(["operator", "recover", "export", f"-data-dir={data_dir}", f"-out={file}"], {})
    assert {each.stat().st_uid for each in data_dir.iterdir()} == {user}

    main(["operator", "recover", "import", config(tmp_path, "n1"), "-survivor", str(file)], {})
    assert {each.stat().st_uid for each in data_dir.iterdir()} == {user}
    assert (data_dir / "snapshot").exists()


def test_a_secret_that_does_not_open_the_state_is_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "n1.export"
    main(["operator", "recover", "export", f"-data-dir={data_dir}", f"-out={file}"], {})

    command = ["operator", "recover", "import", config(tmp_path, "n4", OTHER), "-survivor", str(file)]
    assert main(command, {}) == 1
    assert "write the cluster_secret of the old nodes into it" in capsys.readouterr().err


def test_an_existing_file_is_not_written_over(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kept"
    file.write_text("kept")

    assert main(["operator", "recover", "export", f"-data-dir={data_dir}", f"-out={file}"], {}) == 1
    assert "exists: move it away, or name another file with -out" in capsys.readouterr().err
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export"], "-data-dir is missing"),
        (["export", "directory"], "the directory is given by -data-dir"),
        (["export", "-data-dir=/nowhere/at/all"], "is not a directory"),
        (["import", "x.export"], "-config-file is missing"),
        (["import", "-config-file=x.json"], "no export is given"),
        (["import", "-config-file=/nowhere.json", "x.export"], "The configuration has faults"),
    ],
)
def test_misuse_is_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operator", "recover", *arguments], {}) == 1
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "n1.export"
    file.write_text("{}")

    assert main(["operator", "recover", "import", config(tmp_path, "n4"), str(file)], {}) == 1
    assert f"{file}: the export cannot be read: it is no export of caserver" in capsys.readouterr().err
