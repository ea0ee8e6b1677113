"""Replays the recorded starts of a Consul server with a configuration file: does it start, and what does it serve then."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from caserver.config.agent_config import AgentConfig, ConnectSettings
from caserver.errors import InvalidConfig
from caserver.fields import fault_text
from caserver.providers.builtin import seed_faults
from caserver.state.configuration import parse_bootstrap
from tests.contract.differences import file_difference
from tests.contract.recordings import FILES, in_scope
from tests.contract.replay_test import assert_same_shape
from tests.contract.world import CLUSTER_ID, running

PATHS = {
    "roots": "/v1/connect/ca/roots",
    "config": "/v1/connect/ca/configuration",
    "leaf": "/v1/agent/connect/ca/leaf/web",
}
# As the faults of a file are told: Consul's text, or ours with the same key and types, after the file's name.
TEXTS = {
    "c05-bad-provider": ["nope is not a valid CA provider"],
    "c05-bad-ttl-str": ["error decoding config: 1 error(s) decoding:", "LeafCertTTL", 'time: invalid duration "abc"'],
    "c05-ca-config-string": ["connect.ca_config", "map", "string"],
    "c05-ca-provider-number": ["connect.ca_provider", "string", "number"],
    "c05-unknown-connect-key": ["connect.foo"],
}


def judge(connect: ConnectSettings) -> None:
    """What the agent does before it starts anything."""
    now = datetime(2026, 11, 23, 12, tzinfo=UTC)
    configuration = parse_bootstrap(connect.ca_provider, connect.ca_config)
    faults = seed_faults(configuration, now=now, spare_id=CLUSTER_ID, validity=False)
    if faults:
        raise InvalidConfig(fault_text(faults))


def loaded(path: Path, text: str) -> AgentConfig:
    path.write_text(text)
    return AgentConfig.load(
        [str(path)],
        flags={"data_dir": str(path.parent)},
        environ={},
        hostname="n1",
        judge_ca=judge,
    )


@pytest.mark.parametrize("name", in_scope(FILES))
async def test_a_recorded_configuration_file_does_what_it_did(name: str, tmp_path: Path) -> None:
    recording = FILES[name]
    path = tmp_path / f"{name}.{recording['ext']}"
    if name in TEXTS or file_difference(name):
        with pytest.raises(InvalidConfig) as refused:
            loaded(path, recording["config_file"])
        for part in TEXTS.get(name) or [str(file_difference(name))]:
            assert part in refused.value.detail
        assert recording["started"] is (name not in TEXTS)
        return
    config = loaded(path, recording["config_file"])
    async with running(dev=False, enabled=config.connect.enabled, config=dict(config.connect.ca_config)) as world:
        for which, (status, body) in recording["answers"].items():
            answered = await world.fetch("GET", PATHS[which])
            assert answered.status == status
            if status != 200:
                assert answered.text == body
                continue
            assert_same_shape(json.loads(body), json.loads(answered.text))
            if which == "config":
                assert json.loads(answered.text)["Config"] == json.loads(body)["Config"]
