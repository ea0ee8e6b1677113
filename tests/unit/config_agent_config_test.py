from __future__ import annotations

import base64
import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from caserver.config.agent_config import KEYS, AgentConfig, ConnectSettings
from caserver.config.consul_keys import IGNORED
from caserver.config.listeners import Limits, Ports
from caserver.config.servers import Peer
from caserver.errors import InvalidConfig
from caserver.fields import Secret
from caserver.state.configuration import parse_bootstrap
from caserver.state.vault_configuration import VaultLocal

ROOT = Path(__file__).resolve().parents[2]
SECRET = base64.b64encode(bytes(range(32))).decode()
OTHER_SECRET = base64.b64encode(bytes(range(1, 33))).decode()
PEERS = {"n1": {"address": "10.0.0.1"}, "n2": {"address": "10.0.0.2"}, "n3": {"address": "10.0.0.3"}}
SINGLE = {"data_dir": "/var/lib/none", "connect": {"enabled": True}}
CLUSTER = {**SINGLE, "peer": PEERS, "node_name": "n1", "cluster_secret": SECRET}


def judge(connect: ConnectSettings) -> None:
    local = VaultLocal.from_environ({}, file_dir=connect.file_dir)
    parse_bootstrap(connect.ca_provider, connect.ca_config, local=local)


def load(
    *documents: object, flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, at: Path
) -> AgentConfig:
    """Load documents (HCL text, or mappings as JSON) in order."""
    paths = []
    for number, each in enumerate(documents):
        path = at / f"{number}.{'hcl' if isinstance(each, str) else 'json'}"
        path.touch(mode=0o600)
        path.write_text(each if isinstance(each, str) else json.dumps(each))
        paths.append(str(path))
    return AgentConfig.load(paths, flags=flags or {}, environ=environ or {}, hostname="host", judge_ca=judge)


def faults(
    *documents: object, flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, at: Path
) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        load(*documents, flags=flags, environ=environ, at=at)
    return [line.removeprefix(f"{at}/") for line in caught.value.detail.splitlines()]


def test_defaults(tmp_path: Path) -> None:
    config = load({"data_dir": str(tmp_path / "data")}, at=tmp_path)

    assert config.node_name == "host"
    assert config.datacenter == "dc1"
    assert (config.bind_addr, config.listen.http) == ("127.0.0.1", ("127.0.0.1",))
    assert config.ports == Ports(http=8500, https=None, server=8300, forward=8303)
    assert config.raft_multiplier == 3
    assert config.rpc_hold_timeout == 7.0
    assert config.limits == Limits(200, 5000, 100, 10_000)
    assert (config.log_level, config.log_json) == ("info", False)
    assert not config.connect.enabled
    assert any("connect.enabled: false" in warning for warning in config.warnings)


def test_dev_needs_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    config = load(flags={"dev": True}, at=tmp_path)

    assert config.dev
    assert config.data_dir is None
    assert config.connect.enabled
    assert config.cluster_secrets == ()
    assert config.warnings == ()


def test_dev_is_one_node(tmp_path: Path) -> None:
    found = faults(CLUSTER, flags={"dev": True}, at=tmp_path)

    assert found == ["0.json: peer: -dev is a single node; leave the peer blocks out, or start without -dev"]


def test_a_cluster_in_hcl(tmp_path: Path) -> None:
    config = load(
        f"""
        datacenter     = "DC2"
        node_name      = "n2"
        data_dir       = "/data"
        cluster_secret = ["{SECRET}", "{OTHER_SECRET}"]
        peer "n1" {{ address = "10.0.0.1" server_port = 1 forward_port = 2 }}
        peer "n2" {{ address = "ca2.example" server_port = 3 forward_port = 4 }}
        peer "n3" {{ address = "[::1]" }}
        connect {{
          enabled = true
        }}
        """,
        at=tmp_path,
    )

    assert config.datacenter == "dc2"
    assert config.peers == {
        "n1": Peer("n1", "10.0.0.1", 1, 2),
        "n2": Peer("n2", "ca2.example", 3, 4),
        "n3": Peer("n3", "::1", 8300, 8303),
    }
    assert config.bind_addr == "ca2.example"
    assert (config.ports.server, config.ports.forward) == (3, 4)
    assert config.cluster_secrets == (Secret(SECRET), Secret(OTHER_SECRET))


def test_what_a_node_binds_may_differ_from_what_others_dial(tmp_path: Path) -> None:
    config = load({**CLUSTER, "bind_addr": "10.9.9.9", "ports": {"server": 9300, "forward": 9303}}, at=tmp_path)

    assert config.bind_addr == "10.9.9.9"
    assert (config.ports.server, config.ports.forward) == (9300, 9303)
    assert config.peers["n1"] == Peer("n1", "10.0.0.1", 8300, 8303)


def test_a_flag_beats_the_environment_and_that_a_file(tmp_path: Path) -> None:
    files = ({**SINGLE, "ports": {"http": 1}, "log_level": "warn", "datacenter": "a"},)
    environ = {"CASERVER_PORTS_HTTP": "2", "CASERVER_LOG_LEVEL": "debug"}

    config = load(*files, environ=environ, flags={"ports.http": "3"}, at=tmp_path)

    assert config.ports.http == 3
    assert config.log_level == "debug"
    assert config.datacenter == "a"


def test_later_files_override_earlier_ones_key_by_key(tmp_path: Path) -> None:
    config = load(
        {**SINGLE, "ports": {"http": 1, "server": 2}, "connect": {"ca_config": {"leaf_cert_ttl": "24h"}}},
        'ports { http = 5 }\nconnect { enabled = true ca_config { LeafCertTTL = "48h" RotationPeriod = "100h" } }',
        at=tmp_path,
    )

    assert (config.ports.http, config.ports.server) == (5, 2)
    assert config.connect.ca_config == {"LeafCertTTL": "48h", "RotationPeriod": "100h"}


def test_a_directory_is_read_in_alphabetical_order(tmp_path: Path) -> None:
    (tmp_path / "b.hcl").write_text('datacenter = "two"')
    (tmp_path / "a.json").write_text('{"datacenter": "one", "data_dir": "/d"}')
    (tmp_path / "ignored.txt").write_text("not read")

    config = AgentConfig.load([str(tmp_path)], flags={}, environ={}, hostname="h")

    assert config.datacenter == "two"


def test_the_environment_reaches_lists_tables_and_the_ca_configuration(tmp_path: Path) -> None:
    config = load(
        {"data_dir": "/d", "connect": {"ca_config": {"LeafCertTTL": "24h"}}},
        environ={
            "CASERVER_CLUSTER_SECRET": f"{SECRET}, {OTHER_SECRET}",
            "CASERVER_PEER": json.dumps(PEERS),
            "CASERVER_NODE_NAME": "n3",
            "CASERVER_CONNECT_ENABLED": "true",
            "CASERVER_CONNECT_CA_CONFIG_LEAF_CERT_TTL": "12h",
            "CASERVER_HTTP_CONFIG_ALLOWED_HOSTS": '["a", "b"]',
            "CASERVER_LOG_JSON": "",
        },
        at=tmp_path,
    )

    assert len(config.cluster_secrets) == 2
    assert config.peers["n3"].address == "10.0.0.3"
    assert config.connect.enabled
    assert config.connect.ca_config == {"leaf_cert_ttl": "12h"}
    assert config.http.allowed_hosts == ("a", "b")


def test_variables_that_mean_nothing_are_named_but_not_those_of_others(tmp_path: Path) -> None:
    config = load(
        {**SINGLE, "cluster_secret": SECRET},
        environ={
            "CASERVER_DATADIR": "/x",
            "CASERVER_PORT_8500_TCP_ADDR": "10.1.1.1",
            "CASERVER_SERVICE_HOST": "10.1.1.1",
            "CASERVER_HTTP_TOKEN": "for the client",
            "OTHER": "1",
        },
        at=tmp_path,
    )

    assert config.warnings == ("CASERVER_DATADIR: no such setting, ignored; did you mean CASERVER_DATA_DIR?",)


def test_every_fault_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    found = faults(
        {"data_dri": "/x", "log_level": "loud"},
        'ports {\n  http = "x"\n}\nperformance { raft_multiplier = 11 }',
        environ={"CASERVER_DATACENTER": "a b"},
        flags={"client_addr": "10.0.0.1:80"},
        at=tmp_path,
    )

    assert set(found) == {
        '0.json: data_dri: unknown key; did you mean "data_dir"?',
        '0.json: log_level: "loud" is no level; use trace, debug, info, warn or error',
        '1.hcl:2: ports.http: "x" is not a number; give a number',
        "1.hcl:4: performance.raft_multiplier: 11 is too large; use at most 10",
        'CASERVER_DATACENTER: datacenter: "a b" is no datacenter name; use letters, digits, hyphens, underscores',
        'flag: client_addr: "10.0.0.1:80" is no address; give IP addresses or DNS names, without a port',
        'data_dir: missing; name a directory of this node alone, data_dir = "/var/lib/caserver"',
    }


def test_a_file_that_cannot_be_read_does_not_make_its_keys_missing(tmp_path: Path) -> None:
    found = faults('data_dir = "x', {"log_level": "loud"}, at=tmp_path)

    assert [line.split(": ")[0] for line in found] == ["0.hcl:1:13", "1.json"]


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"ports": {"htpp": 1}}, '0.json: ports.htpp: unknown key; did you mean "http"?'),
        ({"connect": {"CAProvider": "consul"}}, '0.json: connect.CAProvider: unknown key; did you mean "ca_provider"?'),
        (
            {"connect": {"file_dir": "vault"}},
            '0.json: connect.file_dir: "vault" is not absolute; name a directory, file_dir = "/etc/caserver/vault"',
        ),
        (
            {"connect": {"file_dir": "/no/where"}},
            "0.json: connect.file_dir: /no/where is not a directory; create it, or leave it out to refuse such files",
        ),
        ({"connect": 5}, "0.json: connect: expected map, got float64; give an object { ... }"),
        ({"connect": {"enabled": "x"}}, "0.json: connect.enabled: expected bool, got string; use true or false"),
        (
            {"connect": {"ca_config": "x"}},
            "0.json: connect.ca_config: expected map, got string; give an object { ... }",
        ),
        (
            {"ports": {"http": 0}},
            "0.json: ports.http: 0 is no port; give a port number, or -1 to turn the listener off",
        ),
        ({"ports": {"http": 70000}}, "0.json: ports.http: 70000 is too large; use at most 65535"),
        ({"ports": {"http": 8300}}, "0.json: ports.server: 8300 is also ports.http; give each listener its own port"),
        (
            {"ports": {"https": 8501}},
            "0.json: ports.https: needs cert_file and key_file; set them, or leave the port out",
        ),
        ({"cert_file": "/nope"}, "0.json: cert_file: /nope is not a file; check the path and its permissions"),
        ({"cert_file": "/nope"}, "key_file: missing; HTTPS needs cert_file and key_file"),
        (
            {"verify_incoming": True},
            "0.json: verify_incoming: needs cert_file, key_file and ca_file or ca_path; set them, or leave it out",
        ),
        (
            {"data_dir": __file__},
            f"0.json: data_dir: {__file__} is not a directory; name a directory of this node alone",
        ),
        (
            {"client_addr": '{{ GetInterfaceIP "none0" }}'},
            '0.json: client_addr: {{ GetInterfaceIP "none0" }} gives no address on this machine; write the address itself',
        ),
        (
            {"client_addr": "10.0.0"},
            '0.json: client_addr: "10.0.0" is no address; give IP addresses or DNS names, without a port',
        ),
        (
            {"node_name": "a b"},
            '0.json: node_name: "a b" is no node name; use up to 63 letters, digits, dots, hyphens, underscores',
        ),
        (
            {"performance": {"rpc_hold_timeout": "1ms"}},
            "0.json: performance.rpc_hold_timeout: 0.001s is too short; use at least 0.1s",
        ),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, document: Mapping[str, object], fault: str) -> None:
    assert fault in faults({**SINGLE, **document}, at=tmp_path)


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (
            {"cluster_secret": None},
            "0.json: cluster_secret: missing; make one with `caserver keygen` and give it to every peer",
        ),
        ({"cluster_secret": "x"}, "0.json: cluster_secret: not base64; make one with `caserver keygen`"),
        (
            {"cluster_secret": [SECRET, "AAAA"]},
            "0.json: cluster_secret[1]: holds 3 bytes, 32 are needed; make one with `caserver keygen`",
        ),
        (
            {"cluster_secret": [SECRET, SECRET]},
            "0.json: cluster_secret: the same secret is listed twice; keep one of them",
        ),
        (
            {"peer": {"n1": {}}},
            "0.json: peer.n1.address: missing; give the IP address or DNS name that the other servers dial",
        ),
        (
            {"peer": {"n1": {"address": "::0"}}},
            '0.json: peer.n1.address: "::0" cannot be dialled; give the address that the other servers dial',
        ),
        (
            {"peer": {"n1": {"address": "x"}, "n2": {"address": "X"}}},
            "0.json: peer.n2.server_port: X:8300 is also peer.n1.server_port; give every peer its own address or ports",
        ),
        (
            {"peer": {"n1": {"address": "x", "server_port": 1, "forward_port": 1}}},
            "0.json: peer.n1.forward_port: x:1 is also peer.n1.server_port; give every peer its own address or ports",
        ),
        (
            {"peer": {"n1": {"address": "x", "serverport": 1}}},
            '0.json: peer.n1.serverport: unknown key; did you mean "server_port"?',
        ),
        ({"peer": {"n1": "x"}}, '0.json: peer.n1: expected an object; write peer "n1" { address = "..." }'),
        ({"ports": {"server": -1}}, "0.json: ports.server: cannot be off: the peers dial it; give a port number"),
    ],
)
def test_a_wrong_cluster_is_refused(tmp_path: Path, document: Mapping[str, object], fault: str) -> None:
    assert fault in faults({**CLUSTER, **document}, at=tmp_path)


def test_a_node_that_is_not_among_the_peers_is_refused(tmp_path: Path) -> None:
    found = faults({**CLUSTER, "node_name": "n9"}, at=tmp_path)

    assert found == [
        (
            '0.json: node_name: "n9" is not among the peer blocks (n1, n2, n3); '
            'set node_name to one of them, or add peer "n9" { address = "..." } on every node'
        )
    ]


def test_no_fault_shows_a_secret(tmp_path: Path) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n"
    ca_config = {"private_key": [key], "PrivateKey": key, "leaf_cert_ttl": "x"}

    found = faults({**CLUSTER, "cluster_secret": ["hunter2"], "connect": {"ca_config": ca_config}}, at=tmp_path)

    assert len(found) > 2
    assert "hunter2" not in "".join(found)


def test_the_configuration_does_not_show_its_secrets(tmp_path: Path) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n"

    shown = repr(load({**CLUSTER, "connect": {"enabled": True, "ca_config": {"private_key": key}}}, at=tmp_path))

    assert "hunter2" not in shown
    assert SECRET not in shown


def test_keys_of_consul_are_named_in_one_warning(tmp_path: Path) -> None:
    document = {**SINGLE, "server": True, "ports": {"dns": 8600}, "ui": True, "bootstrap_expect": 1}

    config = load(document, at=tmp_path)

    assert (
        config.warnings[-1] == "keys of Consul without a meaning here, ignored: bootstrap_expect, ports.dns, server, ui"
    )


def test_ways_to_join_print_the_peer_blocks_to_write(tmp_path: Path) -> None:
    document = {
        **SINGLE,
        "retry_join": ["10.0.0.1", "10.0.0.2:8301", "[::3]:8301", "provider=aws"],
        "bootstrap_expect": 3,
    }

    text = "\n".join(faults(document, at=tmp_path))

    assert "servers find each other by peer blocks, not by retry_join, bootstrap_expect" in text
    assert 'peer "<node_name of 10.0.0.2>" {\n  address = "10.0.0.2"\n}' in text
    assert 'address = "::3"' in text
    assert "aws" not in text


def test_bootstrap_expect_alone_prints_one_block_for_each_server(tmp_path: Path) -> None:
    text = "\n".join(faults({**SINGLE, "bootstrap_expect": 5}, at=tmp_path))

    assert text.count("peer ") - text.count("by peer") == 5
    assert 'peer "host" {' in text


def test_ways_to_join_mean_nothing_beside_peer_blocks(tmp_path: Path) -> None:
    config = load({**CLUSTER, "retry_join": ["10.0.0.1"], "bootstrap_expect": 3}, at=tmp_path)

    assert config.warnings == ("keys of Consul without a meaning here, ignored: bootstrap_expect, retry_join",)


def test_warnings_of_what_is_likely_a_mistake(tmp_path: Path) -> None:
    peers = dict(list(PEERS.items())[:2])

    config = load({**CLUSTER, "peer": peers, "client_addr": "10.0.0.1"}, at=tmp_path)

    assert any("2 servers survive no more failures than 1" in warning for warning in config.warnings)
    assert any("10.0.0.1 is not loopback and port 8500 is plain HTTP" in warning for warning in config.warnings)


def test_a_secret_that_others_may_read_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(CLUSTER))
    path.chmod(0o644)

    config = AgentConfig.load([str(path)], flags={}, environ={}, hostname="h")

    assert config.warnings == (f"{path}: holds a secret and others may read it (0644); run chmod 600 {path}",)


def test_faults_of_the_ca_configuration_are_among_the_others(tmp_path: Path) -> None:
    found = faults(
        f'{json.dumps("x")[1:-1]} = 1\ndata_dir = "/d"\nconnect {{\n enabled = true\n ca_config {{\n  leaf_cert_ttl = "abc"\n }}\n}}',
        at=tmp_path,
    )

    assert any(line.startswith("0.hcl:6: connect.ca_config.leaf_cert_ttl: ") for line in found)
    assert any(line.startswith("0.hcl:1: x: unknown key") for line in found)


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        (
            "snake_case in a block",
            'ca_config { leaf_cert_ttl = "24h" private_key_type = "rsa" private_key_bits = 2048 }',
        ),
        (
            "snake_case in an object",
            'ca_config = { leaf_cert_ttl = "24h", private_key_type = "rsa", private_key_bits = 2048 }',
        ),
        ("PascalCase in a block", 'ca_config { LeafCertTTL = "24h" PrivateKeyType = "rsa" PrivateKeyBits = 2048 }'),
    ],
)
def test_both_spellings_seed_the_same_ca(tmp_path: Path, spelling: str, text: str) -> None:
    config = load(f'data_dir = "/d"\nconnect {{ enabled = true {text} }}', at=tmp_path)
    seeded = parse_bootstrap(config.connect.ca_provider, config.connect.ca_config)

    assert (seeded.effective.leaf_ttl, seeded.effective.private_key_bits) == (24 * 3600, 2048), spelling


@pytest.mark.parametrize("key", KEYS.scalars)
def test_every_known_key_is_read(tmp_path: Path, key: str) -> None:
    *tables, name = key.split(".")
    value: object = {name: {"odd": "shape"}}
    for table in reversed(tables):
        value = {table: value}
    assert isinstance(value, dict)

    found = faults({**SINGLE, **value}, at=tmp_path)

    assert not [line for line in found if "unknown key" in line]
    assert [line for line in found if f" {key}: expected " in line or f"{key}: missing" in line]


def test_no_key_is_both_known_and_ignored() -> None:
    ignored = {f"{table}.{key}" if table else key for table, keys in IGNORED.items() for key in keys}

    assert not ignored & {*KEYS.scalars, *KEYS.open_tables}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").iterdir()), ids=lambda file: file.name)
def test_every_example_can_be_bootstrapped(file: Path) -> None:
    environ = {"CASERVER_CLUSTER_SECRET": SECRET}

    config = AgentConfig.load([str(file)], flags={}, environ=environ, hostname="h", judge_ca=judge)

    assert config.connect.enabled


def test_the_examples_of_three_nodes_agree() -> None:
    configs = [
        AgentConfig.load(
            [str(ROOT / "configs" / f"node{number}.hcl")],
            flags={},
            environ={"CASERVER_CLUSTER_SECRET": SECRET},
            hostname="h",
        )
        for number in (1, 2, 3)
    ]

    assert len({config.node_name for config in configs}) == 3
    assert all(config.peers == configs[0].peers for config in configs)
    assert {config.node_name for config in configs} == set(configs[0].peers)


def test_a_single_server_is_known_by_what_it_advertises(tmp_path: Path) -> None:
    """Not by the address that stands for all: no client could do anything with it."""
    bound = {**SINGLE, "bind_addr": "::"}

    assert load({**bound, "advertise_addr": "10.9.8.7"}, at=tmp_path).own_address == "10.9.8.7"
    assert load({**SINGLE, "bind_addr": "127.0.0.2"}, at=tmp_path).own_address == "127.0.0.2"
    assert ipaddress.ip_address(load(bound, at=tmp_path).own_address).is_unspecified is False
    assert faults({**bound, "advertise_addr": "::"}, at=tmp_path) == [
        '0.json: advertise_addr: "::" stands for every address; give the one that this server is known by'
    ]


def test_a_server_of_a_cluster_is_known_by_its_peer_block(tmp_path: Path) -> None:
    config = load({**CLUSTER, "bind_addr": "::", "advertise_addr": '{{ GetInterfaceIP "none" }}'}, at=tmp_path)

    assert config.own_address == "10.0.0.1"
    assert any("ignored: advertise_addr" in each for each in config.warnings)


def test_rare_keys_of_consul_are_known_too(tmp_path: Path) -> None:
    rare: dict[str, object] = {
        "tagged_addresses": {"lan": "10.0.0.1"},
        "snapshot_agent": {"snapshot": {"interval": "1h"}},
        "acl_enable_key_list_policy": True,
        "acl": {"disabled_ttl": "2m"},
        "ports": {"proxy_min_port": 20000, "proxy_max_port": 20255},
    }
    config = load({**SINGLE, **rare}, at=tmp_path)

    assert config.warnings[-1] == (
        "keys of Consul without a meaning here, ignored: acl.disabled_ttl, acl_enable_key_list_policy, "
        "ports.proxy_max_port, ports.proxy_min_port, snapshot_agent, tagged_addresses"
    )
