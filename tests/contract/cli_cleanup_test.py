from __future__ import annotations

import json

import pytest

from caserver.cli import main
from tests.testkit.scripted import scripted_server

OWED = {
    "ID": "3-5a1f09b2",
    "Provider": "vault",
    "Address": "https://vault:8200",
    "Namespace": "",
    "Path": "connect-intermediate",
    "Left": ["the key caserver-x-3 and every issuer with that key"],
    "NotBefore": "2026-11-23T12:00:00Z",
    "Reason": "Vault at https://vault:8200 cannot be reached",
}
SHOWN = """\
ID          3-5a1f09b2
Provider    vault
Address     https://vault:8200
Path        connect-intermediate
Left        the key caserver-x-3 and every issuer with that key
Not Before  2026-11-23T12:00:00Z
Reason      Vault at https://vault:8200 cannot be reached
"""


@pytest.mark.parametrize(("owed", "shown"), [([OWED], SHOWN), ([], "No clean-up is owed.\n")], ids=["one", "none"])
def test_list_says_what_is_left_where(capsys: pytest.CaptureFixture[str], owed: list[object], shown: str) -> None:
    with scripted_server() as server:
        server.answers(json.dumps({"Cleanups": owed}))

        code = main(["connect", "ca", "cleanup", "list", f"-http-addr={server.address}"], {})

    assert (code, capsys.readouterr().out) == (0, shown)
    assert server.asked[0].target == "/v1/connect/ca/cleanup"


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers(json.dumps({"Cleanups": [OWED]}))

        main(["connect", "ca", "cleanup", "list", f"-http-addr={server.address}", "-format=json"], {})

    assert json.loads(capsys.readouterr().out) == {"Cleanups": [OWED]}


def test_forget_says_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers_in_turn(json.dumps({"Cleanups": [OWED]}))
        server.answers('{"Success":true}')

        code = main(["connect", "ca", "cleanup", "forget", f"-http-addr={server.address}", "3-5a1f09b2"], {})

    told = capsys.readouterr().out
    assert (code, told.startswith("Forgotten: 3-5a1f09b2\n"), told.endswith(SHOWN)) == (0, True, True)
    asked = server.asked[1]
    assert (asked.method, asked.target) == ("PUT", "/v1/connect/ca/cleanup/forget?id=3-5a1f09b2")


def test_forget_reports_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers_in_turn(json.dumps({"Cleanups": []}))
        server.answers('no clean-up "9" is owed', 404)

        code = main(["connect", "ca", "cleanup", "forget", f"-http-addr={server.address}", "9"], {})

    assert code == 1
    assert "Unexpected response code: 404" in capsys.readouterr().err


def test_forget_wants_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "ca", "cleanup", "forget"], {}) == 1
    assert "name one clean-up" in capsys.readouterr().err
