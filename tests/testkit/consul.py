"""A stock Consul client, if this machine has one (``scripts/consul`` fetches it)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

WANTED = "Consul v1.8."
_FETCHED = "caserver/consul/usr/bin/consul"


@cache
def binary() -> str | None:
    """The program, None if there is none of the release that the recordings are of."""
    fetched = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _FETCHED
    for found in (str(fetched), shutil.which("consul")):
        if found and Path(found).exists():
            version = subprocess.run([found, "version"], capture_output=True, text=True, check=False).stdout
            if version.startswith(WANTED):
                return found
    return None


def consul(*arguments: str, cwd: Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the stock client to its end."""
    found = binary()
    assert found is not None
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(cwd), **(environ or {})}
    return subprocess.run(
        [found, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=environment
    )
