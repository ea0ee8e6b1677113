"""A network of our own to break: a namespace for each node on one bridge, packets of chosen pairs lost in silence.

It only works in a network namespace that the program made for itself (``reexecute`` makes it, with a mount namespace), so
that the machine's interfaces, routes and mounts are never touched and everything is gone when the processes are, however
they end. A direction is cut by a permanent neighbour entry with an address that nobody has: the frames go out and arrive
nowhere, which needs no packet filter in the kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "mount")
PREFIX = "10.77.0"
NOBODY = "02:00:00:00:00:ff"  # no interface here has it
OUTSIDE = "TORTURE_OUTER_NAMESPACES"  # environment: which namespaces the program was in before it made its own
UNSHARE = ("unshare", "--net", "--mount", "--propagation", "private", "--")
_PROBE = "ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge"

Direction = tuple[int, int]  # (from, to), by the nodes' numbers


def unavailable() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    done = subprocess.run([*UNSHARE, "sh", "-c", _PROBE], capture_output=True, text=True, timeout=20, check=False)
    return None if done.returncode == 0 else f"namespaces cannot be made here: {done.stderr.strip()}"


def reexecute() -> None:
    """Run this program anew in namespaces of its own; returns if it already is."""
    if OUTSIDE in os.environ:
        return
    os.execvpe(UNSHARE[0], [*UNSHARE, sys.executable, *sys.argv], {**os.environ, OUTSIDE: " ".join(_own())})  # noqa: S606 - no shell wanted


def _own() -> list[str]:
    return [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "mnt")]


def _refuse_the_machines_own() -> None:
    outside = os.environ.get(OUTSIDE, "").split()
    if len(outside) != len(_own()) or set(outside) & set(_own()):
        raise RuntimeError("refused: this program is not in namespaces of its own; call reexecute first")


class Networks:
    """The nodes' namespaces, numbered from 1. Use as a context manager."""

    def __init__(self, count: int) -> None:
        _refuse_the_machines_own()
        self.numbers = range(1, count + 1)
        self._holders: list[subprocess.Popen[bytes]] = []
        self._lost: set[Direction] = set()

    def __enter__(self) -> Self:
        self._batch(None, "link set lo up", "link add br0 type bridge", f"addr add {PREFIX}.254/24 dev br0")
        self._batch(None, "link set br0 up")
        for number in self.numbers:
            self._add(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def _add(self, number: int) -> None:
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--", "sh", "-c", "echo; exec sleep 86400"],
            stdout=subprocess.PIPE,
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        holder.stdout.readline()  # now the namespace is there
        self._batch(None, f"link add v{number} type veth peer name w{number}", f"link set w{number} netns {holder.pid}")
        self._batch(None, f"link set v{number} master br0 up")
        self._batch(
            number,
            "link set lo up",
            f"link set w{number} name eth0",
            f"addr add {self.address(number)}/24 dev eth0",
            "link set eth0 up",
        )

    def address(self, number: int) -> str:
        return f"{PREFIX}.{number}"

    def prefix(self, number: int) -> list[str]:
        """What to write before a command to run it as node ``number``; keeps the process id."""
        return ["nsenter", "--target", str(self._holders[number - 1].pid), "--net", "--"]

    def lose(self, directions: Iterable[Direction]) -> None:
        """From now on lose what is sent in exactly these directions."""
        wanted = set(directions)
        for number in self.numbers:
            healed = [f"neigh del {self.address(to)} dev eth0" for at, to in self._lost - wanted if at == number]
            cut = [
                f"neigh replace {self.address(to)} lladdr {NOBODY} dev eth0 nud permanent"
                for at, to in wanted - self._lost
                if at == number
            ]
            self._batch(number, *healed, *cut)
        self._lost = wanted

    def heal(self) -> None:
        self.lose(())

    def _batch(self, number: int | None, *commands: str) -> None:
        if not commands:
            return
        prefix = [] if number is None else self.prefix(number)
        text = "".join(f"{command}\n" for command in commands)
        subprocess.run([*prefix, "ip", "-batch", "-"], input=text, text=True, check=True, capture_output=True)


def apart(left: Sequence[int], right: Sequence[int]) -> set[Direction]:
    """Both directions between every one of ``left`` and every one of ``right``."""
    return {pair for a in left for b in right for pair in ((a, b), (b, a))}


def mount_small(directory: Path, *, mebibytes: int) -> None:
    """A file system of a few MiB in memory at ``directory``, in our own mount namespace; gone when that is."""
    _refuse_the_machines_own()
    directory.mkdir(mode=0o700, parents=True)
    options = f"size={mebibytes}m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "caserver-test", str(directory)], check=True)


def unmount_small(directory: Path) -> None:
    """Undo ``mount_small``: what follows deletes the directory, and must find it empty rather than a mount."""
    subprocess.run(["umount", str(directory)], check=True)
