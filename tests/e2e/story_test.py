"""The story that the documentation tells, on three real processes, with the leader killed between any two of its steps.

docs: "Connect Certificate Management", from the generated root to the rotation to an operator's own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.testkit import openssl
from tests.testkit.cluster import Cluster, Node, run_cli
from tests.testkit.handshake import Proxy, refuses, shake
from tests.testkit.invariants import Witness, check_invariants
from tests.testkit.openssl import OwnRoot

ROTATED = 'CA rotated to new root under provider "consul"'
DEFAULTS = {"IntermediateCertTTL": "8760h", "LeafCertTTL": "72h", "RotationPeriod": "2160h"}
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@dataclass(slots=True)
class Story:
    """What the steps hand on to each other."""

    cluster: Cluster
    directory: Path
    witness: Witness = field(default_factory=Witness)
    old_root: dict[str, Any] = field(default_factory=dict)
    old_leaves: list[dict[str, Any]] = field(default_factory=list)
    new_leaves: list[dict[str, Any]] = field(default_factory=list)
    trust_domain: str = ""
    own: OwnRoot = field(default_factory=lambda: OwnRoot("", ""))

    def verify(self, leaf: dict[str, Any], *roots: str) -> bool:
        return openssl.accepts(self.directory, leaf["CertPEM"], *roots)


def active_of(roots: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(root for root in roots["Roots"] if root["Active"])
    return found


def proxy(leaf: dict[str, Any], *roots: str) -> Proxy:
    return Proxy(chain=leaf["CertPEM"], key=leaf["PrivateKeyPEM"], bundle="".join(roots))


def a_root_was_generated(story: Story) -> None:
    told = [story.witness.roots(node) for node in story.cluster]

    assert all(each == told[0] for each in told)
    assert re.fullmatch(UUID + r"\.consul", told[0]["TrustDomain"])
    assert [root["Name"] for root in told[0]["Roots"]] == ["Consul CA Root Cert"]
    story.old_root, story.trust_domain = active_of(told[0]), told[0]["TrustDomain"]
    assert story.old_root["IntermediateCerts"] is None
    assert openssl.accepts(story.directory, story.old_root["RootCert"], story.old_root["RootCert"])


def the_default_configuration_is_shown(story: Story) -> None:
    told = [node.get("/v1/connect/ca/configuration").json() for node in story.cluster]

    assert all(each == told[0] for each in told)
    assert (told[0]["Provider"], told[0]["Config"], told[0]["State"]) == ("consul", DEFAULTS, None)
    story.witness.saw_configuration(told[0]["ModifyIndex"])


def each_node_hands_out_a_leaf(story: Story) -> None:
    story.old_leaves = [story.witness.leaf(node, f"before-{node.name}") for node in story.cluster]

    for leaf in story.old_leaves:
        assert leaf["ServiceURI"] == f"spiffe://{story.trust_domain}/ns/default/dc/dc1/svc/{leaf['Service']}"
        assert story.verify(leaf, story.old_root["RootCert"])


def an_own_root_is_put_through_a_follower(story: Story) -> None:
    story.own = openssl.make_root(story.directory / "own", story.trust_domain)
    follower = story.cluster.followers()[0]

    reply = follower.put("/v1/connect/ca/configuration", story.own.configuration())

    assert (reply.status, reply.text) == (http.client.OK, "")
    story.cluster.wait_for_log(ROTATED)


def the_configuration_shows_no_key(story: Story) -> None:
    told = [node.get("/v1/connect/ca/configuration").json() for node in story.cluster]

    for each in told:
        assert each["Config"] == {
            "PrivateKey": "<redacted>",
            "RootCert": story.own.certificate,
            "RotationPeriod": "2160h",
        }
    story.witness.saw_configuration(told[0]["ModifyIndex"])


def both_roots_are_listed(story: Story) -> None:
    for node in story.cluster:
        told = story.witness.roots(node)
        active = active_of(told)

        assert len(told["Roots"]) == 2
        assert told["TrustDomain"] == story.trust_domain
        assert active["RootCert"] == story.own.certificate
        assert active["ID"] != story.old_root["ID"] == next(r for r in told["Roots"] if not r["Active"])["ID"]
        (intermediate,) = active["IntermediateCerts"]
        assert openssl.accepts(story.directory, intermediate, story.old_root["RootCert"])


def new_leaves_verify_under_either_root_alone(story: Story) -> None:
    story.new_leaves = [story.witness.leaf(node, f"after-{node.name}") for node in story.cluster]

    for leaf in story.new_leaves:
        first, *rest = openssl.split(leaf["CertPEM"])
        assert len(rest) == 1
        assert openssl.accepts(story.directory, first, story.own.certificate)  # without its intermediate
        assert story.verify(leaf, story.old_root["RootCert"])
        assert not openssl.accepts(story.directory, first, story.old_root["RootCert"])
    for leaf in story.old_leaves:
        assert story.verify(leaf, story.old_root["RootCert"])
        assert not story.verify(leaf, story.own.certificate)


def old_and_new_proxies_speak_both_ways(story: Story) -> None:
    old, new = story.old_root["RootCert"], story.own.certificate
    late = proxy(story.old_leaves[0], old)  # has heard of nothing
    listening = proxy(story.old_leaves[1], old, new)  # knows both roots, still shows its old leaf
    moved = proxy(story.new_leaves[0], old, new)
    newcomer = proxy(story.new_leaves[1], new)

    for one, other in ((late, moved), (listening, moved), (moved, moved), (late, listening), (newcomer, moved)):
        assert shake(one, other)[0]
        assert shake(other, one)[0]
    seen = shake(late, moved)
    assert seen == ([story.new_leaves[0]["ServiceURI"]], [story.old_leaves[0]["ServiceURI"]])
    assert refuses(late, newcomer), "who trusts the new root alone cannot know a leaf of the old one"


def feeding_the_configuration_back_changes_nothing(story: Story) -> None:
    node = story.cluster.followers()[-1]
    before = (node.get("/v1/connect/ca/configuration").json(), node.get("/v1/connect/ca/roots").json())
    file = story.directory / "ca_config.json"

    shown = run_cli("connect", "ca", "get-config", f"-http-addr={node.url}")
    file.write_text(shown.stdout)
    done = run_cli("connect", "ca", "set-config", f"-config-file={file}", f"-http-addr={node.url}")

    assert shown.returncode == 0, shown.stderr
    assert (done.returncode, done.stdout.strip()) == (0, "Configuration updated!"), done.stderr
    assert story.own.key not in shown.stdout
    assert (node.get("/v1/connect/ca/configuration").json(), node.get("/v1/connect/ca/roots").json()) == before


STEPS: tuple[Callable[[Story], None], ...] = (
    a_root_was_generated,
    the_default_configuration_is_shown,
    each_node_hands_out_a_leaf,
    an_own_root_is_put_through_a_follower,
    the_configuration_shows_no_key,
    both_roots_are_listed,
    new_leaves_verify_under_either_root_alone,
    old_and_new_proxies_speak_both_ways,
    feeding_the_configuration_back_changes_nothing,
)


@contextlib.contextmanager
def told(directory: Path) -> Iterator[Story]:
    with Cluster(directory / "nodes").start_ready() as cluster:
        yield Story(cluster, directory)


def kill_the_leader(story: Story) -> None:
    """SIGKILL; the survivors are asked at once, the killed node comes back meanwhile."""
    cluster = story.cluster
    leader = cluster.leader()
    cluster.kill(leader)
    survivor = cluster.answering[0]
    if story.trust_domain:
        # While nobody leads, a call is held, not failed.
        story.witness.leaf(survivor, "during-the-fail-over")
        story.witness.roots(survivor)
    cluster.restart(leader)
    cluster.wait_ready(leader)


def test_the_documented_story(tmp_path: Path) -> None:
    with told(tmp_path) as story:
        for step in STEPS:
            step(story)

        leader = story.cluster.leader()
        assert ROTATED in leader.log
        assert story.own.key.splitlines()[1] not in story.cluster.logs()
        check_invariants(story.cluster, story.witness)


@pytest.mark.parametrize("after", range(len(STEPS)), ids=lambda index: STEPS[index].__name__)
def test_the_story_goes_on_when_the_leader_is_killed(tmp_path: Path, after: int) -> None:
    with told(tmp_path) as story:
        for number, step in enumerate(STEPS):
            step(story)
            if number == after:
                kill_the_leader(story)

        check_invariants(story.cluster, story.witness)


def test_the_story_goes_on_when_every_leader_is_killed(tmp_path: Path) -> None:
    with told(tmp_path) as story:
        for step in STEPS:
            kill_the_leader(story)
            step(story)

        check_invariants(story.cluster, story.witness)


def test_a_refused_root_comes_with_the_commands_that_make_a_good_one(tmp_path: Path) -> None:
    """The root of the documentation's example has no BasicConstraints; what the answer prints makes one that has."""
    with Cluster(tmp_path / "nodes", names=("alone",)).start_ready() as cluster:
        (node,) = cluster
        trust_domain = node.get("/v1/connect/ca/roots").json()["TrustDomain"]
        poor = openssl.make_root_without_constraints(tmp_path / "poor", trust_domain)

        refusal = node.put("/v1/connect/ca/configuration", poor.configuration())

        assert refusal.status == http.client.BAD_REQUEST
        assert poor.key.splitlines()[1] not in refusal.text
        made = run_as_printed(refusal.text, tmp_path / "made")
        accepted = node.put("/v1/connect/ca/configuration", made.configuration())
        assert (accepted.status, accepted.text) == (http.client.OK, "")
        assert active_of(node.get("/v1/connect/ca/roots").json())["RootCert"] == made.certificate


def run_as_printed(refusal: str, directory: Path) -> OwnRoot:
    """Run the openssl commands of a refusal in an empty directory; they write one key and one certificate."""
    commands = [line.strip() for line in refusal.splitlines() if line.strip().startswith("openssl ")]
    assert commands, refusal
    directory.mkdir()
    script = "\n".join(commands)
    done = subprocess.run(
        ["bash", "-euc", script], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    texts = [file.read_text() for file in sorted(directory.iterdir())]
    key = next(text for text in texts if "PRIVATE KEY" in text)
    return OwnRoot(key, next(text for text in texts if "BEGIN CERTIFICATE-" in text))


def bootstrap_file(directory: Path, own: OwnRoot) -> Path:
    """The connect section of the documentation with the PEMs as heredocs."""
    file = directory / "connect.hcl"
    file.write_text(
        'connect {\n  enabled = true\n  ca_provider = "consul"\n  ca_config {\n'
        f"    private_key = <<EOF\n{own.key}EOF\n    root_cert = <<EOF\n{own.certificate}EOF\n  }}\n}}\n"
    )
    return file


def own_trust_domain() -> str:
    return "36cb52cd-4058-f811-0432-6798a240c5d3.consul"


def check_bootstrapped(nodes: list[Node], own: OwnRoot, directory: Path) -> None:
    for node in nodes:
        roots = node.get("/v1/connect/ca/roots").json()
        leaf = node.get(f"/v1/agent/connect/ca/leaf/{node.name}").json()
        shown = node.get("/v1/connect/ca/configuration").json()

        assert roots["TrustDomain"] == own_trust_domain()
        assert [root["RootCert"] for root in roots["Roots"]] == [own.certificate]
        assert openssl.accepts(directory, leaf["CertPEM"], own.certificate)
        assert own.key not in json.dumps(shown)
        assert shown["Config"]["PrivateKey"] == "<redacted>"


def test_a_cluster_is_bootstrapped_with_an_own_root(tmp_path: Path) -> None:
    own = openssl.make_root(tmp_path / "own", own_trust_domain())
    file = bootstrap_file(tmp_path, own)

    with Cluster(tmp_path / "nodes", connect={}, extra_files=[file]).start_ready() as cluster:
        check_bootstrapped(cluster.nodes, own, tmp_path)
        survivor = cluster.followers()[0]
        cluster.kill(cluster.leader())
        check_bootstrapped([survivor], own, tmp_path)


def test_dev_mode_with_an_own_root(tmp_path: Path) -> None:
    own = openssl.make_root(tmp_path / "own", own_trust_domain())
    file = bootstrap_file(tmp_path, own)

    with Cluster(tmp_path / "nodes", names=("dev",), extra_files=[file], dev=True).start_ready() as cluster:
        check_bootstrapped(cluster.nodes, own, tmp_path)
        assert not cluster.nodes[0].data_dir.exists()


def test_the_story_in_dev_mode(tmp_path: Path) -> None:
    with Cluster(tmp_path / "nodes", names=("dev",), dev=True).start_ready() as cluster:
        (node,) = cluster
        before = active_of(node.get("/v1/connect/ca/roots").json())
        own = openssl.make_root(tmp_path / "own", node.get("/v1/connect/ca/roots").json()["TrustDomain"])

        reply = node.put("/v1/connect/ca/configuration", own.configuration())

        assert (reply.status, reply.text) == (http.client.OK, "")
        cluster.wait_for_log(ROTATED)
        roots = node.get("/v1/connect/ca/roots").json()
        assert active_of(roots)["RootCert"] == own.certificate
        leaf = node.get("/v1/agent/connect/ca/leaf/web").json()
        assert openssl.accepts(tmp_path, leaf["CertPEM"], own.certificate)
        assert openssl.accepts(tmp_path, leaf["CertPEM"], before["RootCert"])
