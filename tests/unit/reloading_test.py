from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from caserver.config.agent_config import AgentConfig
from caserver.environment import InlineWorkers
from caserver.errors import InvalidConfig, ReloadFailed
from caserver.fields import Secret
from caserver.listeners import Front
from caserver.reloading import Reloading
from caserver.state.configuration import parse_bootstrap
from tests.testkit.web_certs import WebCA


def config(**flags: object) -> AgentConfig:
    """The settings of a node in memory."""
    given = {key.replace("__", "."): value for key, value in flags.items()}
    return AgentConfig.load([], flags={"dev": True, **given}, environ={}, hostname="n1")


@dataclass
class Agent:
    """Takes over what it is handed."""

    taken: list[AgentConfig] = field(default_factory=list)
    fronts: list[Front] = field(default_factory=list)
    founded: bool = True

    def judge_seed(self, settings: AgentConfig) -> None:
        """Find fault with what the built-in CA does not know."""
        parse_bootstrap(settings.connect.ca_provider, settings.connect.ca_config)

    def take_over(self, settings: AgentConfig, front: Front) -> None:
        self.taken.append(settings)
        self.fronts.append(front)


def reloading(agent: Agent, before: AgentConfig, read: Callable[[], AgentConfig]) -> Reloading:
    made = Reloading(
        before, read=read, workers=InlineWorkers(), founded=lambda: agent.founded, judge_seed=agent.judge_seed
    )
    made.begin(agent.take_over)
    return made


async def test_what_can_change_is_taken_over() -> None:
    agent, fresh = Agent(), config(log_level="debug", limits__leaf_cache_max=5, http_config__allowed_hosts=["x"])
    held = reloading(agent, config(), lambda: fresh)

    with capture_logs() as lines:
        await held.reload()

    assert agent.taken == [held.config]
    assert (held.config.log_level, held.config.limits.leaf_cache_max) == ("debug", 5)
    assert [line["event"] for line in lines] == ["settings reloaded"]


async def test_what_cannot_change_is_named_and_kept() -> None:
    agent = Agent()
    fresh = config(node_name="n2", ports__http=9999, client_addr="127.0.0.2", log_level="warn", datacenter="x")
    held = reloading(agent, config(), lambda: fresh)

    with capture_logs() as lines:
        await held.reload()

    assert (held.config.node_name, held.config.ports.http, held.config.log_level) == ("n1", 8500, "warn")
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == [
        "node_name: changed, and kept as it was: restart the agent to use it",
        "datacenter: changed, and kept as it was: restart the agent to use it",
        "client_addr, addresses or unix_sockets: changed, and kept as it was: restart the agent to use it",
        "ports: changed, and kept as it was: restart the agent to use it",
    ]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"advertise_addr": "192.0.2.7"}, "advertise_addr"),
        ({"bind_addr": "127.0.0.3"}, "bind_addr"),
        ({"bind_addr": "127.0.0.3", "advertise_addr": "192.0.2.7"}, "bind_addr"),
    ],
)
async def test_an_address_of_its_own_is_named_as_in_the_file(changed: dict[str, str], named: str) -> None:
    held = reloading(Agent(), config(), lambda: config(**changed))

    with capture_logs() as lines:
        await held.reload()

    assert [line["event"] for line in lines if line["log_level"] == "warning"] == [
        f"{named}: changed, and kept as it was: restart the agent to use it"
    ]


async def test_a_fault_anywhere_leaves_everything_as_it_was() -> None:
    def broken() -> AgentConfig:
        raise InvalidConfig("n1.hcl:3: log_level: loud is no level\nn1.hcl: data_dri: unknown key")

    agent, before = Agent(), config()
    held = reloading(agent, before, broken)

    with capture_logs() as lines, pytest.raises(ReloadFailed, match="data_dri: unknown key"):
        await held.reload()

    assert (agent.taken, held.config) == ([], before)
    assert [(line["log_level"], len(line["faults"])) for line in lines] == [("error", 2)]


async def test_a_certificate_that_is_being_written_leaves_the_old_one(tmp_path: Path) -> None:
    pair = WebCA(tmp_path).issue("a", hosts=("one.example",))
    agent, with_tls = Agent(), config(cert_file=str(pair.cert), key_file=str(pair.key))
    held = reloading(agent, with_tls, lambda: with_tls)
    whole = pair.cert.read_text()

    pair.cert.write_text(whole[: len(whole) // 2])
    with pytest.raises(ReloadFailed, match="cert_file: no certificate can be read"):
        await held.reload()
    pair.cert.write_text(whole)
    await held.reload()

    assert len(agent.fronts) == 1
    assert [each.tls is not None for each in agent.fronts[0].listeners] == [False, True]


async def test_https_is_not_turned_on_while_it_runs(tmp_path: Path) -> None:
    pair = WebCA(tmp_path).issue("a")
    agent, fresh = Agent(), config(cert_file=str(pair.cert), key_file=str(pair.key))
    held = reloading(agent, config(), lambda: fresh)

    with capture_logs() as lines:
        await held.reload()

    assert held.config.tls is None
    assert len(agent.fronts[0].listeners) == 1
    assert lines[1]["event"].startswith("cert_file and key_file (HTTPS on or off): changed")


async def test_a_reload_during_the_start_waits_for_its_end() -> None:
    agent, settings = Agent(), config()
    held = Reloading(
        settings,
        read=lambda: replace(settings, log_level="warn"),
        workers=InlineWorkers(),
        founded=lambda: True,
        judge_seed=agent.judge_seed,
    )
    waiting = asyncio.ensure_future(held.reload())
    await asyncio.sleep(0)

    assert agent.taken == []
    held.begin(agent.take_over)
    await waiting

    assert [each.log_level for each in agent.taken] == ["warn"]


async def test_of_the_tokens_the_agents_own_may_change() -> None:
    tokens = {"acl__enabled": True, "acl__default_policy": "deny"}
    agent, fresh = Agent(), config(**tokens, acl__tokens__agent="b" * 36)
    held = reloading(agent, config(**tokens, acl__tokens__agent="a" * 36), lambda: fresh)

    with capture_logs() as lines:
        await held.reload()

    assert held.config.acl.agent == Secret("b" * 36)
    assert [line["event"] for line in lines] == ["settings reloaded"]


async def test_how_access_is_controlled_does_not_change_while_it_runs() -> None:
    agent, fresh = Agent(), config(acl__enabled=True, acl__default_policy="deny", acl__tokens__agent="b" * 36)
    held = reloading(agent, config(), lambda: fresh)

    with capture_logs() as lines:
        await held.reload()

    assert not held.config.acl.enabled
    assert lines[-2]["event"] == "acl: changed, and kept as it was: restart the agent to use it"


async def test_what_founds_the_ca_counts_until_it_is_founded() -> None:
    agent = Agent(founded=False)
    fresh = config(connect__ca_config={"leaf_cert_ttl": "24h"}, connect__authorize_default="deny")
    held = reloading(agent, config(), lambda: fresh)

    await held.reload()
    assert held.config.connect.ca_config == {"leaf_cert_ttl": "24h"}
    assert held.config.connect.authorize_default is None

    agent.founded = True
    fresh = config(connect__ca_config={"leaf_cert_ttl": "48h"})
    with capture_logs() as lines:
        await held.reload()
    assert held.config.connect.ca_config == {"leaf_cert_ttl": "24h"}
    (told,) = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert "connect: changed, and kept as it was: it founds a cluster only" in told


async def test_a_fault_in_what_founds_the_ca_leaves_everything_as_it_was() -> None:
    agent, before = Agent(founded=False), config()
    held = reloading(agent, before, lambda: config(connect__ca_config={"leaf_cert_tll": "24h"}, log_level="warn"))

    with capture_logs(), pytest.raises(ReloadFailed, match="leaf_cert_tll"):
        await held.reload()

    assert (agent.taken, held.config) == ([], before)
