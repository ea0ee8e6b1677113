"""``caserver members`` and ``caserver info`` against a scripted server: Consul's tables and exit codes."""

from __future__ import annotations

import json

import pytest

from caserver.cli import main
from tests.testkit.scripted import Scripted, scripted_server

MEMBERS = [
    {"Name": "n2", "Addr": "10.0.0.2", "Port": 8300, "Status": 4,
     "Tags": {"role": "consul", "build": "1.8.7:caserver", "vsn": "2", "dc": "dc1"}},
    {"Name": "n1", "Addr": "::1", "Port": 8300, "Status": 1,
     "Tags": {"role": "consul", "build": "1.8.7:caserver", "vsn": "2", "dc": "dc1"}},
    {"Name": "web", "Addr": "10.0.0.9", "Port": 8301, "Status": 1,
     "Tags": {"role": "node", "build": "1.8.7:x", "vsn": "2", "dc": "dc1", "segment": ""}},
]  # fmt: skip


def run(document: object, *words: str, status: int = 200) -> tuple[int, Scripted]:
    with scripted_server() as server:
        server.answers(document if isinstance(document, str) else json.dumps(document), status)
        return main([*words, f"-http-addr={server.address}"], {}), server


def test_members_is_consuls_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, server = run(MEMBERS, "members")

    assert (code, capsys.readouterr().out) == (
        0,
        (
            "Node  Address        Status  Type    Build  Protocol  DC   Segment\n"
            "n1    [::1]:8300     alive   server  1.8.7  2         dc1  <all>\n"
            "n2    10.0.0.2:8300  failed  server  1.8.7  2         dc1  <all>\n"
            "web   10.0.0.9:8301  alive   client  1.8.7  2         dc1  <default>\n"
        ),
    )
    assert server.asked[0].target == "/v1/agent/members?segment=_all"


def test_members_in_detail_of_one_status(capsys: pytest.CaptureFixture[str]) -> None:
    code, server = run(MEMBERS, "members", "-detailed", "-status=fail", "-wan")

    assert (code, capsys.readouterr().out) == (
        0,
        (
            "Node  Address        Status  Tags\n"
            "n2    10.0.0.2:8300  failed  build=1.8.7:caserver,dc=dc1,role=consul,segment=<all>,vsn=2\n"
        ),
    )
    assert server.asked[0].target == "/v1/agent/members?wan=1"


def test_members_of_no_such_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(MEMBERS, "members", "-status=left")[0] == 2
    assert capsys.readouterr().out == ""
    assert run(MEMBERS, "members", "-status=[")[0] == 1
    assert "Failed to compile status regexp" in capsys.readouterr().err


def test_members_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    run(MEMBERS, "members", "-format=json")

    assert [each["Name"] for each in json.loads(capsys.readouterr().out)] == ["n1", "n2", "web"]


def test_info_is_consuls_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run({"Stats": {"raft": {"term": "2", "state": "Leader"}, "build": {"version": "1"}}}, "info")

    assert (code, capsys.readouterr().out) == (0, "build:\n\tversion = 1\nraft:\n\tstate = Leader\n\tterm = 2\n")


def test_info_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run({"Config": {}}, "info")[0] == 1
    assert "did not contain stats" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"), [(["members"], "Error retrieving members: "), (["info"], "Error querying agent: ")]
)
def test_refusals_are_told_in_consuls_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Permission denied", *words, status=403)[0] == 1
    assert capsys.readouterr().err == f"{said}Unexpected response code: 403 (Permission denied)\n"
