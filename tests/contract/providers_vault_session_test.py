from __future__ import annotations

import asyncio
import base64
import json
import socketserver
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from caserver.environment import SystemClock, ThreadWorkers
from caserver.errors import ProviderRefused, ProviderUnavailable
from caserver.fields import Secret
from caserver.providers.vault.endpoint import Endpoint, Login
from caserver.providers.vault.session import Reason, VaultSession
from tests.testkit.cluster import LOOPBACK, free_ports
from tests.testkit.keys import private_key
from tests.testkit.openbao import Server, unique
from tests.testkit.vault import now

SESAME = "s.sesame"


@asynccontextmanager
async def session(endpoint: Endpoint, *, threads: int = 2) -> AsyncIterator[VaultSession]:
    workers = ThreadWorkers(threads)
    opened = VaultSession(endpoint, clock=SystemClock(), workers=workers, pool_size=threads)
    try:
        yield opened
    finally:
        opened.close()
        workers.close()


class Impostor:
    """A server that says what it is told to, and remembers what it was sent; None: it never says anything."""

    def __init__(self, reply: bytes | None) -> None:
        self.seen = b""
        self._ends = threading.Event()
        impostor = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while (line := self.rfile.readline()) not in (b"", b"\r\n"):
                    impostor.seen += line
                if reply is None:
                    impostor._ends.wait(30)
                else:
                    self.wfile.write(reply)

        self._server = socketserver.ThreadingTCPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._server.shutdown()
        self._server.server_close()


def http(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", body]
    return "\r\n".join(lines).encode()


def json_reply(status: str, body: str) -> bytes:
    return http(status, body, "Content-Type: application/json")


async def failure(endpoint: Endpoint, *, deadline: float = 10.0) -> str:
    async with session(endpoint) as opened:
        with pytest.raises(ProviderUnavailable) as caught:
            await opened.call("get", "sys/mounts/x", deadline=deadline)
    assert SESAME not in caught.value.detail
    assert caught.value.__cause__ is None
    assert endpoint.address in caught.value.detail
    return caught.value.detail


async def test_an_answer_carries_its_data(openbao: Server) -> None:
    async with session(Endpoint(openbao.address, token=Secret(openbao.token))) as opened:
        answer = await opened.call("get", "auth/token/lookup-self")
        assert answer.ok
        assert answer.data["id"] == openbao.token
        assert openbao.token not in repr(answer)


async def test_a_refusal_is_an_answer_with_reasons_of_ours(openbao: Server) -> None:
    async with session(Endpoint(openbao.address, token=Secret(openbao.token))) as opened:
        answer = await opened.call("get", f"sys/mounts/{unique('nothing')}")
        assert (answer.ok, answer.reasons) == (False, frozenset({Reason.NO_SUCH_MOUNT}))
        answer = await opened.call("get", "sys/mounts", namespace="nowhere")
        assert answer.reasons == frozenset({Reason.UNKNOWN_NAMESPACE})
    async with session(Endpoint(openbao.address, token=Secret(SESAME))) as opened:
        assert (await opened.call("get", "sys/mounts")).denied


async def test_namespaces_are_kept_apart(openbao: Server) -> None:
    name = unique("team")
    openbao.ask("POST", f"sys/namespaces/{name}", {})
    openbao.mount("only-here", namespace=name)
    async with session(Endpoint(openbao.address, token=Secret(openbao.token))) as opened:
        calls = [opened.call("get", "sys/mounts/only-here", namespace=where) for where in ("", name) * 10]
        assert [answer.ok for answer in await asyncio.gather(*calls)] == [False, True] * 10


async def test_nobody_there() -> None:
    (port,) = free_ports(1)
    told = await failure(Endpoint(f"http://{LOOPBACK}:{port}", token=Secret(SESAME)))
    assert told.endswith("cannot be reached: Connection refused")


async def test_a_name_that_does_not_resolve() -> None:
    told = await failure(Endpoint("http://vault.invalid:8200", token=Secret(SESAME)))
    assert "does not resolve" in told


async def test_a_server_that_never_answers_costs_the_deadline_and_no_more() -> None:
    with Impostor(None) as silent:
        told = await failure(Endpoint(silent.address, token=Secret(SESAME)), deadline=0.2)
        assert "did not answer within 0.2 s" in told


async def test_waiting_for_a_thread_counts_too() -> None:
    with Impostor(None) as silent:
        async with session(Endpoint(silent.address, token=Secret(SESAME)), threads=1) as opened:
            calls = [opened.call("get", "x", deadline=0.3) for _ in range(5)]
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, ProviderUnavailable) for result in results)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
async def test_a_redirect_is_not_followed_and_the_token_stays(status: str) -> None:
    with Impostor(http("200 OK")) as elsewhere:
        location = f"Location: {elsewhere.address}/v1/sys/mounts/x"
        with Impostor(http(status, "", location)) as first:
            told = await failure(Endpoint(first.address, token=Secret(SESAME)))
        assert "which is not followed" in told
        assert elsewhere.seen == b""


@pytest.mark.parametrize(
    "reply",
    [
        json_reply("500 Error", '{"errors": ["the token is s.sesame"]}'),
        http("500 Error", "the token is s.sesame"),
        json_reply("502 Bad", "not json s.sesame"),
        http("429 Slow", "s.sesame"),
        b"s.sesame is no HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\ns.sesame",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 8\r\nConnection: close\r\n\r\ns.sesame",
    ],
    ids=["errors", "text", "broken json", "rate limit", "no http", "cut off", "broken gzip"],
)
async def test_what_an_odd_server_says_is_never_repeated(reply: bytes) -> None:
    with Impostor(reply) as server:
        await failure(Endpoint(server.address, token=Secret(SESAME)))


async def test_a_refusal_of_an_odd_server_is_not_repeated() -> None:
    with Impostor(json_reply("400 Bad", '{"errors": ["s.sesame"]}')) as server:
        async with session(Endpoint(server.address, token=Secret(SESAME))) as opened:
            answer = await opened.call("get", "x")
    assert answer.status == 400
    assert SESAME not in repr(answer) + answer.why


async def test_speaking_tls_to_a_plain_port_is_told_apart(openbao: Server) -> None:
    told = await failure(Endpoint(openbao.address.replace("http:", "https:"), token=Secret(SESAME)))
    assert "cannot be talked to through TLS" in told


async def test_an_own_session_ignores_the_environment(openbao: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "VAULT_ADDR"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("VAULT_TOKEN", "s.environment")
    monkeypatch.setenv("VAULT_NAMESPACE", "environment")
    async with session(Endpoint(openbao.address, token=Secret(openbao.token))) as opened:
        assert (await opened.call("get", "auth/token/lookup-self")).data["id"] == openbao.token


def approle(server: Server, **options: object) -> tuple[Login, str]:
    """A login by AppRole, and the path of its role."""
    mount = unique("approle")
    server.ask("POST", f"sys/auth/{mount}", {"type": "approle"})
    path = f"auth/{mount}/role/ca"
    server.ask("POST", path, {"token_policies": ["default"], "token_ttl": "1h", **options})
    role_id = server.ask("GET", f"{path}/role-id")["role_id"]
    secret_id = server.ask("POST", f"{path}/secret-id", {})["secret_id"]
    return Login("approle", mount, (("role_id", Secret(role_id)), ("secret_id", Secret(secret_id)))), path


async def test_a_login_yields_a_token_and_its_lease(openbao: Server) -> None:
    login, _ = approle(openbao)
    async with session(Endpoint(openbao.address, login=login)) as opened:
        assert (await opened.look_up()).ok
        assert opened.lease is not None
        assert (opened.lease.renewable, 3500 < opened.lease.ttl <= 3600) == (True, True)


async def test_a_token_that_was_revoked_is_replaced_by_one_login(openbao: Server) -> None:
    login, _ = approle(openbao)
    async with session(Endpoint(openbao.address, login=login)) as opened:
        first = (await opened.call("get", "auth/token/lookup-self")).data["id"]
        opened._logged_in_at = None  # as if it had been a while ago
        openbao.ask("POST", "auth/token/revoke", {"token": first})
        answers = await asyncio.gather(*(opened.call("get", "auth/token/lookup-self") for _ in range(6)))
        assert all(answer.ok for answer in answers)
        assert len({answer.data["id"] for answer in answers} - {first}) == 1


async def test_a_missing_permission_causes_no_storm_of_logins(openbao: Server) -> None:
    login, path = approle(openbao)
    openbao.ask("POST", path, {"secret_id_num_uses": 0, "token_num_uses": 0})
    async with session(Endpoint(openbao.address, login=login)) as opened:
        tokens = set()
        for _ in range(5):
            assert (await opened.call("get", "sys/mounts")).denied
            tokens.add((await opened.call("get", "auth/token/lookup-self")).data["id"])
        assert len(tokens) == 1


async def test_a_refused_login_says_where_and_shows_nothing(openbao: Server) -> None:
    login, _ = approle(openbao)
    wrong = Login(login.type, login.mount_path, (login.params[0], ("secret_id", Secret(SESAME))))
    async with session(Endpoint(openbao.address, login=wrong)) as opened:
        with pytest.raises(ProviderRefused) as caught:
            await opened.look_up()
    assert f"auth/{login.mount_path}" in caught.value.detail
    assert SESAME not in caught.value.detail


async def test_userpass(openbao: Server) -> None:
    mount = unique("userpass")
    openbao.ask("POST", f"sys/auth/{mount}", {"type": "userpass"})
    openbao.ask("POST", f"auth/{mount}/users/ca", {"password": SESAME, "token_policies": ["default"]})
    login = Login("userpass", mount, (("password", Secret(SESAME)), ("username", Secret("ca"))))
    async with session(Endpoint(openbao.address, login=login)) as opened:
        assert (await opened.look_up()).ok


def signed_jwt(**claims: object) -> str:
    """An ES256 token by a key of the testkit."""

    def encoded(part: bytes) -> str:
        return base64.urlsafe_b64encode(part).rstrip(b"=").decode()

    head = encoded(b'{"alg": "ES256", "typ": "JWT"}')
    text = f"{head}.{encoded(json.dumps(claims).encode())}"
    key = private_key("ec-256")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    der = key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    r, s = decode_dss_signature(der)
    return f"{text}.{encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


async def test_jwt_from_a_file_that_is_read_at_every_login(openbao: Server, tmp_path: Path) -> None:
    mount = unique("jwt")
    openbao.ask("POST", f"sys/auth/{mount}", {"type": "jwt"})
    public = private_key("ec-256").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    openbao.ask("POST", f"auth/{mount}/config", {"jwt_validation_pubkeys": [public]})
    role = {"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["mesh"], "token_policies": ["default"]}
    openbao.ask("POST", f"auth/{mount}/role/ca", role)
    file = tmp_path / "token"
    file.write_text("no token yet")
    login = Login("jwt", mount, (("role", Secret("ca")),), (("jwt", file),))
    async with session(Endpoint(openbao.address, login=login)) as opened:
        with pytest.raises(ProviderRefused, match=f"refused the jwt login at auth/{mount}"):
            await opened.look_up()
        at = int(now().timestamp())
        file.write_text(f"{signed_jwt(sub='ca', aud='mesh', iat=at, nbf=at, exp=at + 600)}\n")
        await opened.log_in()
        assert (await opened.look_up()).ok
