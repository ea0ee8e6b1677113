"""Real nodes: ``caserver agent`` processes on free loopback ports, to start, kill, pause, resume and ask over HTTP.

Every process is ended by its own pid when the cluster closes, and by the kernel if this program dies before.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
READY_WITHIN = 90.0  # seconds; a cold Python for each node, on a machine that does other things
ENDS_WITHIN = 60.0  # seconds that a process may take to end after it was asked to
HELD_FOR = 30  # seconds that a call waits for a leader: a fail-over on a busy machine is a pause all the same
ANSWERS_WITHIN = 60.0  # seconds for one request, longer than it may be held
RAFT_MULTIPLIER = 2  # a new leader within about 1.2 s, and no election because a busy test machine is late
POLL = 0.05  # seconds between two looks at a process
LOG_TAIL = 60  # lines shown of each node when something fails

Value = TypeVar("Value")


class NotInTime(AssertionError):
    """Something that was waited for did not happen."""


def wait_for(what: str, probe: Callable[[], Value | None], *, within: float = READY_WITHIN) -> Value:
    """Call ``probe`` until it returns something else than None and return that."""
    end = time.monotonic() + within
    while (value := probe()) is None:
        if time.monotonic() > end:
            raise NotInTime(f"waited {within:g} s for {what}")
        time.sleep(POLL)
    return value


_claims: dict[int, socket.socket] = {}  # UDP sockets of the ports that this program gave out


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return True
    return False


def _claimed(port: int) -> bool:
    """Claim a port from other programs that look for free ones here: its UDP twin is taken, which no node needs."""
    claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        claim.bind((LOOPBACK, port))
    except OSError:
        claim.close()
        return False
    _claims[port] = claim
    return True


def give_back(ports: Iterable[int]) -> None:
    """Ports of ``free_ports`` that nothing listens on any more; others may have them."""
    for port in ports:
        if (claim := _claims.pop(port, None)) is not None:
            claim.close()


def free_ports(count: int, preferred: Sequence[int] = ()) -> list[int]:
    """Free ports, the preferred ones where they are; below the ephemeral range, so that no outgoing connection takes one.

    A port is given out once, also while nothing listens there (yet, or because its node was killed), and to one program.
    """
    found: list[int] = []
    for port in dict.fromkeys([*preferred, *random.sample(range(15000, 32000), 2000)]):
        if len(found) == count:
            break
        if not _claimed(port):
            continue
        if is_free(port):
            found.append(port)
        else:
            give_back([port])
    return found


@dataclass(frozen=True, slots=True)
class Reply:
    """What a node answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        assert self.status == http.client.OK, f"{self.status}: {self.text}"
        return json.loads(self.body)


@dataclass(slots=True)
class Node:
    """One node: its files, its ports and, while it runs, its process."""

    name: str
    directory: Path
    http_port: int
    server_port: int
    forward_port: int
    process: subprocess.Popen[bytes] | None = None
    paused: bool = False
    extra: list[str] = field(default_factory=list)  # further command line arguments
    address: str = LOOPBACK
    prefix: list[str] = field(default_factory=list)  # written before its command line, to run it somewhere else
    module: list[str] = field(default_factory=lambda: ["caserver"])  # what Python runs

    @property
    def config_file(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def data_dir(self) -> Path:
        return self.directory / f"{self.name}-data"

    @property
    def log_file(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http_port}"

    @property
    def server_address(self) -> str:
        return f"{self.address}:{self.server_port}"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def answering(self) -> bool:
        return self.running and not self.paused

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = ANSWERS_WITHIN,
    ) -> Reply:
        """One HTTP request; ``body`` is sent as it is (text) or as JSON. OSError if the node does not answer."""
        data = body if isinstance(body, str | bytes | None) else json.dumps(body)
        connection = http.client.HTTPConnection(self.address, self.http_port, timeout=timeout)
        try:
            connection.request(method, path, data, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, {key.lower(): value for key, value in response.getheaders()}, response.read())
        except http.client.HTTPException as exc:  # the connection broke in the middle of an answer
            raise ConnectionError(repr(exc)) from exc
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Reply:
        return self.request("GET", path, **options)

    def put(self, path: str, body: Any = None, **options: Any) -> Reply:
        return self.request("PUT", path, body, **options)

    def try_get(self, path: str, timeout: float = 2.0) -> Reply | None:
        """Like ``get``, None if the node does not answer."""
        try:
            return self.get(path, timeout=timeout)
        except OSError:
            return None


def agent_command(*arguments: str, module: Sequence[str] = ("caserver",)) -> list[str]:
    """The command line of a caserver verb; an agent also dies with this program."""
    command = [sys.executable, "-m", *module, *arguments]
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv and arguments[:1] == ("agent",) else command


def run_cli(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a caserver verb to its end."""
    environment = {**os.environ, **(environ or {})}
    return subprocess.run(
        agent_command(*arguments),
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def keygen() -> str:
    """A fresh cluster secret."""
    done = run_cli("keygen")
    assert done.returncode == 0, f"caserver keygen: {done.stderr}"
    return done.stdout.strip()


class Cluster:
    """Nodes that know each other, in one directory. Use as a context manager: leaving it ends every process."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str] = ("n1", "n2", "n3"),
        *,
        connect: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        extra_files: Sequence[Path] = (),
        preferred_ports: Sequence[int] = (),
        secret: str | None = None,
        dev: bool = False,
        addresses: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self._settings = dict(settings or {})
        self._connect = {"enabled": True, **(connect or {})}
        self._extra_files = tuple(extra_files)
        self._dev = dev
        self._ports = free_ports(3 * len(names), preferred_ports)
        trios = zip(self._ports[0::3], self._ports[1::3], self._ports[2::3], strict=True)
        self.nodes = [
            Node(name, directory, http_port=http, server_port=server, forward_port=forward, address=address)
            for name, address, (http, server, forward) in zip(
                names, addresses or [LOOPBACK] * len(names), trios, strict=True
            )
        ]
        self._secret = secret or (keygen() if len(names) > 1 else "")
        directory.mkdir(parents=True, exist_ok=True)
        for node in self.nodes:
            self._write_config(node)

    def _write_config(self, node: Node) -> None:
        config: dict[str, Any] = {
            "node_name": node.name,
            "bind_addr": node.address,
            "client_addr": node.address,
            "ports": {"http": node.http_port, "server": node.server_port, "forward": node.forward_port},
            "connect": self._connect,
            "performance": {"raft_multiplier": RAFT_MULTIPLIER, "rpc_hold_timeout": f"{HELD_FOR}s"},
            **self._settings,
        }
        if not self._dev:
            config["data_dir"] = str(node.data_dir)
        if len(self.nodes) > 1:
            config["cluster_secret"] = self._secret
            config["peer"] = {
                each.name: {
                    "address": each.address,
                    "server_port": each.server_port,
                    "forward_port": each.forward_port,
                }
                for each in self.nodes
            }
        node.config_file.touch(mode=0o600)
        node.config_file.write_text(json.dumps(config, indent=2))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:
            error.add_note(self.logs())

    def close(self) -> None:
        """End every process; politely, as long as there are enough for the leader to hand its leadership over."""
        for node in self.nodes:
            if node.running and node.process is not None:
                self.resume(node)
                node.process.terminate()
        alone = (len(self.nodes) - 1) // 2  # so many would wait for a successor that cannot come
        with contextlib.suppress(NotInTime):
            wait_for("the nodes to end", lambda: True if self._running <= alone else None, within=ENDS_WITHIN)
        for node in self.nodes:
            if node.process is not None:
                node.process.kill()
                node.process.wait()
        give_back(self._ports)

    @property
    def _running(self) -> int:
        return sum(node.running for node in self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    @property
    def answering(self) -> list[Node]:
        return [node for node in self.nodes if node.answering]

    def start(self, *nodes: Node) -> None:
        """Start the processes of the given nodes (all, if none are given) without waiting for anything."""
        for node in nodes or self.nodes:
            files = [f"-config-file={file}" for file in (node.config_file, *self._extra_files)]
            mode = ["-dev"] if self._dev else []
            with node.log_file.open("ab") as log:
                node.process = subprocess.Popen(
                    [*node.prefix, *agent_command("agent", *mode, *files, *node.extra, module=node.module)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
            node.paused = False

    def start_ready(self) -> Self:
        """Start every node and wait until each serves roots."""
        self.start()
        self.wait_ready()
        return self

    def wait_ready(self, *nodes: Node, within: float = READY_WITHIN) -> None:
        """Wait until the nodes (all that run, if none are given) say that they are ready and show an active root."""
        for node in nodes or self.answering:
            wait_for(f"{node.name} to be ready", partial(self._is_ready, node), within=within)

    def _is_ready(self, node: Node) -> bool | None:
        if node.process is not None and (code := node.process.poll()) is not None:
            raise NotInTime(f"{node.name} ended with exit code {code}\n{node.log}")
        ready = node.try_get("/v1/status/ready")
        if ready is None or ready.status != http.client.OK:
            return None
        roots = node.try_get("/v1/connect/ca/roots", timeout=10)
        return True if roots is not None and roots.status == http.client.OK and roots.json()["ActiveRootID"] else None

    def leader(self, *, within: float = READY_WITHIN) -> Node:
        """The node that every answering node names as leader, once they agree on one that runs."""

        def agreed() -> Node | None:
            replies = [node.try_get("/v1/status/leader") for node in self.answering]
            named = {reply.json() if reply is not None and reply.status == http.client.OK else "" for reply in replies}
            return next((node for node in self.answering if named == {node.server_address}), None)

        return wait_for("a leader that all name", agreed, within=within)

    def followers(self) -> list[Node]:
        leader = self.leader()
        return [node for node in self.answering if node is not leader]

    def kill(self, node: Node) -> None:
        """SIGKILL: nothing is flushed, nothing is said."""
        assert node.process is not None
        node.process.kill()
        node.process.wait()
        node.paused = False

    def pause(self, node: Node) -> None:
        assert node.process is not None
        node.process.send_signal(signal.SIGSTOP)
        node.paused = True

    def resume(self, node: Node) -> None:
        if node.paused and node.process is not None:
            node.process.send_signal(signal.SIGCONT)
            node.paused = False

    def stop(self, node: Node, *, within: float = ENDS_WITHIN) -> int:
        """SIGTERM, and the exit code."""
        assert node.process is not None
        node.process.terminate()
        return node.process.wait(timeout=within)

    def restart(self, node: Node) -> None:
        """Start a node again that was killed or stopped, on its old files; does not wait."""
        assert not node.running
        self.start(node)

    def wait_for_log(self, text: str, *nodes: Node, within: float = READY_WITHIN) -> Node:
        """The first of the nodes (all, if none are given) whose log holds ``text``."""
        watched = nodes or tuple(self.nodes)
        return wait_for(
            f"the log line {text!r}", lambda: next((node for node in watched if text in node.log), None), within=within
        )

    def logs(self) -> str:
        """The end of every node's log."""
        return "\n".join(
            f"---- {node.name} ({'runs' if node.running else 'ended'})\n" + "\n".join(node.log.splitlines()[-LOG_TAIL:])
            for node in self.nodes
        )
