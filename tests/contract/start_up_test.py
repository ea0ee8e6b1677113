"""What a fresh Python process loads, and what it says when nobody reads along."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.testkit.cluster import ROOT

HEAVY = {"aiohttp", "cryptography", "hcl2", "lark", "pysyncobj", "structlog"}


def test_the_client_loads_no_engine() -> None:
    code = "import sys, caserver.client; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)

    assert "caserver" in done.stdout.split()
    assert not set(done.stdout.split()) & {"pysyncobj", "hvac", "prometheus_client", "hcl2"}


@pytest.mark.parametrize("words", [["version"], ["connect", "ca", "roots", "-http-addr=127.0.0.1:1"]])
def test_small_commands_load_nothing_heavy(words: list[str]) -> None:
    code = "import sys; from caserver.cli import main; main(sys.argv[1:], {}); print(*sys.modules, file=sys.stderr)"

    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)

    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & HEAVY


def test_a_reader_that_went_away_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "caserver", "version"], check=False, stdout=writing, stderr=subprocess.PIPE
        )
    finally:
        os.close(writing)

    assert (done.returncode, done.stderr) == (1, b"")
