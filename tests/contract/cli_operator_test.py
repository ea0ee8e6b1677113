from __future__ import annotations

import json

import pytest

from caserver.cli import main
from tests.testkit.scripted import scripted_server

SERVERS = [
    {"ID": "634a6034-b543", "Node": "cli", "Address": "127.0.0.1:18581", "Leader": True, "ProtocolVersion": "3", "Voter": True},
    {"ID": "x", "Node": "second", "Address": "127.0.0.1:1", "Leader": False, "ProtocolVersion": "3", "Voter": False},
]  # fmt: skip


def test_list_peers_prints_consuls_table(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers(json.dumps({"Servers": SERVERS, "Index": 0}))

        code = main(["operator", "raft", "list-peers", f"-http-addr={server.address}", "-stale"], {})

    assert (code, capsys.readouterr().out) == (
        0,
        (
            "Node    ID             Address          State     Voter  RaftProtocol\n"
            "cli     634a6034-b543  127.0.0.1:18581  leader    true   3\n"
            "second  x              127.0.0.1:1      follower  false  3\n"
        ),
    )
    assert server.asked[0].target == "/v1/operator/raft/configuration?stale="


def test_list_peers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers(json.dumps({"Servers": SERVERS, "Index": 0}))

        main(["operator", "raft", "list-peers", f"-http-addr={server.address}", "-format=json"], {})

    assert json.loads(capsys.readouterr().out)["Servers"] == SERVERS


def test_list_peers_reports_a_refusal_in_consuls_words(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers("No cluster leader", 500)

        code = main(["operator", "raft", "list-peers", f"-http-addr={server.address}"], {})

    assert code == 1
    assert capsys.readouterr().err == (
        "Error getting peers: Failed to retrieve raft configuration: Unexpected response code: 500 (No cluster leader)\n"
    )


KEYRING = {
    "Nodes": [
        {"Node": "n1", "Announced": True, "Keys": ["bb", "aa"], "Stored": ["aa", "bb"]},
        {"Node": "second", "Announced": False, "Keys": [], "Stored": []},
    ],
    "Keys": [
        {"ID": "bb", "Seals": ["hmac", "root/1"], "Removable": False, "NeededBecause": ["it seals 2 stored secrets"]},
        {"ID": "aa", "Seals": [], "Removable": True, "NeededBecause": []},
    ],
}


def test_keyring_status_shows_who_holds_what_and_what_may_go(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers(json.dumps(KEYRING))

        code = main(["operator", "keyring", "status", f"-http-addr={server.address}"], {})

    assert (code, capsys.readouterr().out) == (
        0,
        (
            "Node    Holds (first seals)  Stored under\n"
            "n1      bb, aa               aa, bb\n"
            "second  not announced        -\n"
            "\n"
            "Key  Seals  May go\n"
            "bb   2      no: it seals 2 stored secrets\n"
            "aa   0      yes\n"
            "A key that may go seals nothing that a server uses. Exports, backups and *.old files of a data directory that "
            "were made under it still hold what it seals: delete them, too.\n"
        ),
    )
    assert server.asked[0].target == "/v1/operator/keyring"


def test_keyring_status_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers(json.dumps(KEYRING))

        main(["operator", "keyring", "status", f"-http-addr={server.address}", "-format=json"], {})

    assert json.loads(capsys.readouterr().out) == KEYRING


@pytest.mark.parametrize(("arguments", "target"), [([], ""), (["-id=n2"], "?id=n2"), (["-id", "n2"], "?id=n2")])
def test_transfer_leader_says_success(arguments: list[str], target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers('{"Success":true}')

        code = main(["operator", "raft", "transfer-leader", f"-http-addr={server.address}", *arguments], {})

    assert (code, capsys.readouterr().out) == (0, "Success\n")
    assert (server.asked[0].method, server.asked[0].target) == ("PUT", f"/v1/operator/raft/transfer-leader{target}")


def test_transfer_leader_reports_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers("leadership was not handed over: n2 could not take it", 503)

        code = main(["operator", "raft", "transfer-leader", f"-http-addr={server.address}"], {})

    assert code == 1
    assert "Error transferring leadership: Unexpected response code: 503 (leadership was not" in capsys.readouterr().err


AUTOPILOT = {
    "CleanupDeadServers": False,
    "LastContactThreshold": "600ms",
    "MaxTrailingLogs": 250,
    "MinQuorum": 0,
    "ServerStabilizationTime": "0s",
    "RedundancyZoneTag": "",
    "DisableUpgradeMigration": True,
    "UpgradeVersionTag": "",
    "CreateIndex": 1,
}


def test_autopilot_configuration_is_shown_as_consul_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers(json.dumps(AUTOPILOT))
        code = main(["operator", "autopilot", "get-config", f"-http-addr={server.address}"], {})

    assert (code, capsys.readouterr().out) == (
        0,
        (
            "CleanupDeadServers = false\nLastContactThreshold = 600ms\nMaxTrailingLogs = 250\nMinQuorum = 0\n"
            'ServerStabilizationTime = 0s\nRedundancyZoneTag = ""\nDisableUpgradeMigration = true\nUpgradeVersionTag = ""\n'
        ),
    )


@pytest.mark.parametrize(("flag", "target"), [("-id=n1", "id=n1"), ("-address=1.2.3.4:5", "address=1.2.3.4%3A5")])
def test_remove_peer_tells_what_the_cluster_says(flag: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        server.answers("no\nbut do this", 400)
        code = main(["operator", "raft", "remove-peer", flag, f"-http-addr={server.address}"], {})

    assert code == 1
    assert capsys.readouterr().err == "Error removing peer: Unexpected response code: 400 (no\nbut do this)\n"
    assert (server.asked[0].method, server.asked[0].target) == ("DELETE", f"/v1/operator/raft/peer?{target}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Error removing peer: an address or id is required for the peer to remove\n"),
        (["-id=n1", "-address=x"], "Error removing peer: cannot give both an address and id\n"),
    ],
)
def test_remove_peer_names_one_server(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operator", "raft", "remove-peer", *words], {}) == 1
    assert capsys.readouterr().err == said
