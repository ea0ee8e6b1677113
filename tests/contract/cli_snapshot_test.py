"""``caserver snapshot`` against a scripted server: files, output and exit codes, as recorded from Consul's own command."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caserver.cli import main
from tests.testkit.scripted import scripted_server
from tests.unit.archive_test import CONSULS, made

INSPECTED = """ID           2-31-1795433149432
Size         9432
Index        31
Term         2
Version      1

"""


class Snapshots:
    """A server with one snapshot to give, and what it was sent."""

    def __init__(self, data: bytes, status: int = 200) -> None:
        self.data, self.status = data, status
        self.sent: list[bytes] = []
        self.targets: list[str] = []
        self.port = 0


@contextmanager
def serving(found: Snapshots) -> Iterator[Snapshots]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found.targets.append(self.path)
            self._answer(found.data, {"X-Consul-Index": "24"})

        def do_PUT(self) -> None:
            found.targets.append(self.path)
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            found.sent.append(body)
            self._answer(found.data)

        def _answer(self, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(found.status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def run(server: Snapshots, *words: str) -> int:
    return main(["snapshot", *words, f"-http-addr=127.0.0.1:{server.port}"], {})


def test_save_writes_a_verified_file_of_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "backup.snap"
    with serving(Snapshots(made())) as server:
        code = run(server, "save", "-stale", str(target))

    assert (code, capsys.readouterr().out) == (0, "Saved and verified snapshot to index 24\n")
    assert target.read_bytes() == made()
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["backup.snap"]
    assert server.targets == ["/v1/snapshot?stale="]


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"damaged", 200, "Error verifying snapshot: the snapshot is not compressed"),
        (made()[:-1], 200, "Error verifying snapshot: the snapshot is cut short"),
        (b"Permission denied", 403, "Error saving snapshot: Unexpected response code: 403 (Permission denied)\n"),
    ],
)
def test_save_leaves_the_former_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, status: int, said: str
) -> None:
    target = tmp_path / "backup.snap"
    target.write_bytes(b"former")
    with serving(Snapshots(data, status)) as server:
        code = run(server, "save", str(target))

    assert code == 1
    assert capsys.readouterr().err.startswith(said)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("backup.snap", b"former")]


def test_save_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Snapshots(made())) as server:
        code = run(server, "save", str(tmp_path / "nowhere" / "x"))

    assert code == 1
    assert "Error writing snapshot file: " in capsys.readouterr().err


def test_restore_sends_the_file_in_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "backup.snap"
    source.write_bytes(made())
    with serving(Snapshots(b"")) as server:
        code = run(server, "restore", str(source))

    assert (code, capsys.readouterr().out) == (0, "Restored snapshot\n")
    assert server.sent == [made()]


def test_restore_reports_a_refusal_in_consuls_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "backup.snap"
    source.write_bytes(b"x")
    with serving(Snapshots(b"no snapshot", 400)) as server:
        code = run(server, "restore", str(source))

    assert code == 1
    assert capsys.readouterr().err == "Error restoring snapshot: Unexpected response code: 400 (no snapshot)\n"


def test_inspect_prints_what_consul_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", "inspect", str(CONSULS)], {}) == 0
    assert capsys.readouterr().out == INSPECTED


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["snapshot", "inspect", "-format=json", str(CONSULS)], {})

    assert json.loads(capsys.readouterr().out)["Index"] == 31


@pytest.mark.parametrize("verb", ["save", "inspect", "restore"])
@pytest.mark.parametrize(
    ("files", "said"),
    [((), "Missing FILE argument\n"), (("a", "b"), "Too many arguments (expected 1, got 2)\n")],
)
def test_one_file_is_named(capsys: pytest.CaptureFixture[str], verb: str, files: tuple[str, ...], said: str) -> None:
    assert main(["snapshot", verb, *files], {}) == 1
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("verb", ["inspect", "restore"])
def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    missing = tmp_path / "nope.tgz"

    assert main(["snapshot", verb, str(missing)], {}) == 1
    assert capsys.readouterr().err == f"Error opening snapshot file: open {missing}: no such file or directory\n"


def test_inspect_of_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk = tmp_path / "junk.tgz"
    junk.write_bytes(b"hello")

    assert main(["snapshot", "inspect", str(junk)], {}) == 1
    assert capsys.readouterr().err.startswith("Error verifying snapshot: ")


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        pass
    code = main(["snapshot", "save", f"-http-addr={server.address}", str(tmp_path / "x")], {})

    assert code == 1
    assert f'Error saving snapshot: Get "http://{server.address}/v1/snapshot": dial tcp' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
