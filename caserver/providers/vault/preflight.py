"""Permissions: what the provider will do at which path, asked of the server before anything is written.

The policy lines are those of README, so that what is missing can be copied into a policy as it is printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from caserver.errors import InvalidConfig
from caserver.fields import Fault, fault_text
from caserver.providers.vault.session import VaultSession

ROLE_PREFIX = "caserver-"
ASKING = "sys/capabilities-self"
_METHOD_NEEDS = {"get": "read", "list": "list", "post": "update", "delete": "delete"}
# What varies in a path -> how a policy writes it.
_PATTERNS = (
    (re.compile(r"/issuer/[^/]+"), "/issuer/+"),
    (re.compile(r"/key/[^/]+"), "/key/+"),
    (re.compile(rf"/(roles|sign)/{ROLE_PREFIX}[^/]*"), rf"/\1/{ROLE_PREFIX}*"),
)


@dataclass(frozen=True, slots=True)
class Need:
    """A path of one namespace and what will be done there."""

    namespace: str
    path: str
    capabilities: tuple[str, ...]

    @property
    def line(self) -> str:
        """The line of a policy that grants it."""
        path = self.path
        for pattern, written in _PATTERNS:
            path = pattern.sub(written, path)
        wanted = ", ".join(f'"{each}"' for each in self.capabilities)
        return f'path "{path}" {{ capabilities = [{wanted}] }}'


def policy_line(method: str, path: str) -> str:
    """The line of a policy that allows one request."""
    return Need("", path, (_METHOD_NEEDS[method],)).line


def token_needs(namespace: str, *, renewable: bool) -> list[Need]:
    """What the upkeep of the token itself takes."""
    needs = [Need(namespace, "auth/token/lookup-self", ("read",))]
    if renewable:
        needs.append(Need(namespace, "auth/token/renew-self", ("update",)))
    return needs


def root_needs(namespace: str, path: str, *, mounted: bool, generated: bool) -> list[Need]:
    """What is done at the root path: always signing, and making what is not there yet."""
    needs = []
    if not mounted:
        needs.append(Need(namespace, f"sys/mounts/{path}", ("read", "update")))
    if generated:
        needs.append(Need(namespace, f"{path}/root/generate/internal", ("update",)))
    return [
        *needs,
        Need(namespace, f"{path}/issuer/default/sign-intermediate", ("update",)),
        Need(namespace, f"{path}/intermediate/cross-sign", ("update",)),
    ]


def intermediate_needs(namespace: str, path: str, role: str, *, ours: bool) -> list[Need]:
    """What is done at the intermediate path; ``ours`` = we mount it, or did so before."""
    needs = []
    if ours:
        needs.append(Need(namespace, f"sys/mounts/{path}", ("read", "update", "delete")))
    return [
        *needs,
        Need(namespace, f"{path}/roles/{role}", ("update",)),
        Need(namespace, f"{path}/intermediate/generate/internal", ("update",)),
        Need(namespace, f"{path}/intermediate/generate/existing", ("update",)),
        Need(namespace, f"{path}/intermediate/set-signed", ("update",)),
        Need(namespace, f"{path}/issuer/default/sign/{role}", ("update",)),
        Need(namespace, f"{path}/config/issuers", ("update",)),
        *cleaning_needs(namespace, path),
    ]


def cleaning_needs(namespace: str, path: str) -> list[Need]:
    """What removing an issuer of ours takes at the intermediate path."""
    return [
        Need(namespace, f"{path}/keys", ("list",)),
        Need(namespace, f"{path}/issuer/default", ("delete",)),
        Need(namespace, f"{path}/key/default", ("delete",)),
    ]


async def require(session: VaultSession, needs: Sequence[Need]) -> None:
    """InvalidConfig with the policy lines of every permission that is missing."""
    missing = [
        each
        for namespace in dict.fromkeys(need.namespace for need in needs)
        for each in await _missing(session, namespace, [need for need in needs if need.namespace == namespace])
    ]
    if missing:
        raise InvalidConfig(_told(missing))


async def _missing(session: VaultSession, namespace: str, needs: Sequence[Need]) -> list[Need]:
    answer = await session.call("post", ASKING, {"paths": [need.path for need in needs]}, namespace=namespace)
    if answer.denied:
        return [Need(namespace, ASKING, ("update",))]
    if answer.status != HTTPStatus.OK:
        raise InvalidConfig(
            f"error configuring provider: Vault at {session.endpoint.address} did not answer {ASKING}: {answer.why}"
        )
    return [need for need in needs if not _granted(need, answer.data.get(need.path))]


def _granted(need: Need, held: object) -> bool:
    if not isinstance(held, list):
        return False
    return "root" in held or set(need.capabilities) <= set(held)


def _told(missing: Iterable[Need]) -> str:
    """One fault for each missing permission, each with the line that mends it."""
    heading = "error configuring provider: the Vault token lacks permissions; add these lines to its policy"
    faults = []
    for need in missing:
        where = f" in namespace {need.namespace}" if need.namespace else ""
        faults.append(Fault("Token", f"is not allowed what is needed{where}", need.line, heading))
    return fault_text(faults)
