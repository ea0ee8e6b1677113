#!/usr/bin/env python3
"""Re-make requirements.lock: exact pins and hashes of everything that running, testing and building caserver takes.

Run it with the environment's Python after a change of the dependencies in pyproject.toml:  .venv/bin/python scripts/lock.py
Hashes are taken of the files that pip itself downloads for each platform below, so no index is named anywhere.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.11", "3.13")  # Debian 12 and 13
MACHINES = ("x86_64", "aarch64")
# pip does not derive the older tags from a newer one when --platform is given.
TAGS = (
    "manylinux_2_34",
    "manylinux_2_31",
    "manylinux_2_28",
    "manylinux_2_17",
    "manylinux2014",
    "manylinux_2_5",
    "manylinux1",
)
SOURCE_ONLY = {"pysyncobj"}  # publishes no wheel
BUILD = ["setuptools>=80"]  # builds the source-only ones and the editable install
HEAD = """\
# Exact versions of everything that running, testing and building caserver takes, with the hashes of the files that
# Python {pythons} on Linux ({machines}) may install. Made by scripts/lock.py from pyproject.toml; do not edit.
"""


def pip(*arguments: str) -> None:
    """Run pip, quietly; a failure ends the program with pip's own words."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"scripts/lock.py: failed: {' '.join(command)}")


def wanted() -> list[str]:
    """What pyproject.toml asks for, run and test."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["test"], *BUILD]


def resolve(directory: Path) -> dict[str, str]:
    """Name and exact version of every package, from pip's own resolver."""
    report = directory / "report.json"
    pip("install", "--dry-run", "--ignore-installed", "--report", str(report), *wanted())
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    return {item["name"].lower().replace("_", "-"): item["version"] for item in found}


def download(directory: Path, name: str, version: str) -> None:
    """Fetch every file of one package that the platforms need."""
    if name in SOURCE_ONLY:
        pip("download", "--no-deps", "--no-binary", ":all:", "-d", str(directory), f"{name}=={version}")
        return
    for python in PYTHONS:
        for machine in MACHINES:
            tags = [f"--platform={tag}_{machine}" for tag in TAGS]
            where = ["-d", str(directory), "--only-binary", ":all:", "--python-version", python]
            pip("download", "--no-deps", *where, *tags, f"{name}=={version}")


def entry(directory: Path, name: str, version: str) -> str:
    """The lock's lines for one package."""
    folder = directory / name
    folder.mkdir()
    download(folder, name, version)
    hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir())
    print(f"{name}=={version}: {len(hashes)} files", flush=True)
    return " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{value}" for value in hashes)])


def main() -> None:
    """Resolve, download, hash, write."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        entries = [entry(directory, name, version) for name, version in sorted(resolve(directory).items())]
    head = HEAD.format(pythons=" and ".join(PYTHONS), machines=", ".join(MACHINES))
    LOCK.write_text(head + "\n".join(entries) + "\n")


if __name__ == "__main__":
    main()
