"""One PKI secrets engine of a Vault server: the requests of its API that the provider needs, as values.

Names, paths and parameters of Vault's API are known here and nowhere else. A refusal becomes ProviderRefused with the path,
the reason in our words and, where a permission is missing, the policy line that grants it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

from caserver.errors import CaserverError, ProviderRefused, ProviderUnavailable
from caserver.providers.vault.preflight import policy_line
from caserver.providers.vault.session import Answer, Reason, VaultSession

SLOW = 30.0  # seconds for what may make an RSA key
BACKDATED = 300  # seconds that the NotBefore of a CA certificate lies in the past, so that no leaf predates its issuer
LEAF_BACKDATED = 60  # the same of leaves
_FOREVER = "876000h"


class Presence(Enum):
    """What is known of a mount path."""

    MOUNTED = auto()
    FREE = auto()
    HIDDEN = auto()  # nothing there, or nothing that this token may see
    ENCLOSED = auto()  # below the path of another engine, so that nothing can be mounted there


@dataclass(frozen=True, slots=True)
class Mount:
    """What lies at a path; ``managed`` = the token may ask about mounts by path, and so is meant to make them."""

    presence: Presence
    kind: str = ""  # "pki", "kv", ...
    description: str = ""  # of an enclosed path: the path of the engine around it
    managed: bool = False


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer of the engine; ``key_id`` is empty if the engine does not hold its key."""

    id: str
    key_id: str


@dataclass(frozen=True, slots=True)
class LeafRequest:
    """What is asked of the engine for one leaf."""

    csr_pem: str
    common_name: str
    spiffe_uri: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class PKIEngine:
    """The engine at ``path`` of ``namespace``."""

    session: VaultSession = field(repr=False)
    namespace: str
    path: str

    @property
    def place(self) -> str:
        """The path from the server's root namespace: a namespace may be written as one or as the beginning of a path."""
        return f"{self.namespace}/{self.path}".strip("/")

    async def mount(self) -> Mount:
        """What lies at the path: asked as an administrator of mounts, else as a mere user of what is below."""
        managing = await self._call("get", f"sys/mounts/{self.path}")
        if not managing.ok and not managing.denied:
            return Mount(Presence.FREE, managed=True)
        using = await self._call("get", f"sys/internal/ui/mounts/{self.path}")
        found = str(using.data.get("path", "")).strip("/")
        if using.ok and found != self.path:
            return Mount(Presence.ENCLOSED, str(using.data.get("type", "")), found)
        if managing.ok:
            return _mounted(managing.data, managed=True)
        return _mounted(using.data, managed=False) if using.ok else Mount(Presence.HIDDEN)

    async def create(self, description: str) -> None:
        """Mount the engine; somebody else having done so in the meantime is no error."""
        body = {
            "type": "pki",
            "description": description,
            "config": {"max_lease_ttl": _FOREVER, "default_lease_ttl": _FOREVER},
        }
        answer = await self._call("post", f"sys/mounts/{self.path}", body)
        if Reason.PATH_IN_USE not in answer.reasons or (await self.mount()).presence is not Presence.MOUNTED:
            self._accept(answer, "post", f"sys/mounts/{self.path}")

    async def remove(self) -> None:
        """Unmount the engine with everything in it; nothing being there is no error."""
        await self._done("delete", f"sys/mounts/{self.path}")

    async def default_pem(self) -> str | None:
        """The certificate of the default issuer; None if there is no issuer."""
        answer = await self._call("get", f"{self.path}/ca/pem")
        if answer.ok:
            return answer.text.strip() + "\n" if "BEGIN CERTIFICATE" in answer.text else None
        if Reason.NO_DEFAULT_ISSUER in answer.reasons:
            return None
        raise self._refused(answer, "get", f"{self.path}/ca/pem")

    async def issuers(self) -> tuple[Issuer, ...]:
        """Every issuer; empty if there is none (or no engine)."""
        listed = await self._listed("issuers")
        return tuple(Issuer(each, str(facts.get("key_id") or "")) for each, facts in listed.items())

    async def issuer_pem(self, issuer_id: str) -> str | None:
        """The certificate of an issuer; None if it does not exist."""
        path = f"{self.path}/issuer/{issuer_id}/json"
        answer = await self._call("get", path)
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        self._accept(answer, "get", path)
        return _text(answer.data, "certificate")

    async def issuer_of(self, certificate_pem: str) -> Issuer | None:
        """The issuer that holds exactly this certificate."""
        for issuer in await self.issuers():
            found = await self.issuer_pem(issuer.id)
            if found is not None and found.split() == certificate_pem.split():
                return issuer
        return None

    async def keys(self) -> Mapping[str, str]:
        """Ids of the engine's named keys, by name."""
        listed = await self._listed("keys")
        return {str(facts["key_name"]): each for each, facts in listed.items() if facts.get("key_name")}

    async def generate_root(
        self, *, name: str, common_name: str, uri: str, key_type: str, key_bits: int, ttl: int
    ) -> None:
        """Make a self-signed root whose key never leaves the engine; one of this name being there is no error."""
        body = {
            **_subject(common_name, uri),
            "issuer_name": name,
            "key_name": name,
            "key_type": key_type,
            "key_bits": key_bits,
            "ttl": f"{ttl}s",
            "not_before_duration": f"{BACKDATED}s",
        }
        path = f"{self.path}/root/generate/internal"
        answer = await self._call("post", path, body, deadline=SLOW)
        if Reason.NAME_IN_USE not in answer.reasons:
            self._accept(answer, "post", path)

    async def request_intermediate(
        self, *, key_id: str | None, name: str, common_name: str, uri: str, key_type: str, key_bits: int
    ) -> str | None:
        """A CSR (PEM) for an intermediate with the key ``key_id``, or a new one; None if one called ``name`` is there already."""
        body: dict[str, object] = _subject(common_name, uri)
        if key_id is None:
            kind = "internal"
            body |= {"key_name": name, "key_type": key_type, "key_bits": key_bits}
        else:
            kind = "existing"
            body["key_ref"] = key_id
        path = f"{self.path}/intermediate/generate/{kind}"
        answer = await self._call("post", path, body, deadline=SLOW)
        if key_id is None and Reason.NAME_IN_USE in answer.reasons:
            return None
        self._accept(answer, "post", path)
        return _text(answer.data, "csr")

    async def request_cross_signing(
        self, key_id: str, *, common_name: str, uris: Sequence[str], subject: Mapping[str, Sequence[str]]
    ) -> str:
        """A CSR (PEM) that an issuer's own key signs, to be certified by somebody else; ``subject`` by Vault's names."""
        body = {
            **{name: list(values) for name, values in subject.items()},
            "key_ref": key_id,
            "common_name": common_name,
            "uri_sans": list(uris),
            "exclude_cn_from_sans": True,
            "add_basic_constraints": True,
        }
        return _text((await self._done("post", f"{self.path}/intermediate/cross-sign", body)).data, "csr")

    async def sign_ca(self, issuer_id: str, csr_pem: str, *, not_after: datetime, path_length: int = -1) -> str:
        """Certify a CA's CSR with its own subject and names; the certificate (PEM)."""
        body = {
            "csr": csr_pem,
            "use_csr_values": True,
            "format": "pem",
            "max_path_length": path_length,
            "not_after": _instant(not_after),
            "not_before_duration": f"{BACKDATED}s",
        }
        answer = await self._done("post", f"{self.path}/issuer/{issuer_id}/sign-intermediate", body, deadline=SLOW)
        return _text(answer.data, "certificate")

    async def sign_self_issued(self, issuer_id: str, certificate_pem: str) -> str:
        """Certify another root under its own serial, names and validity; the certificate (PEM)."""
        body = {"certificate": certificate_pem, "require_matching_certificate_algorithms": False}
        answer = await self._done("post", f"{self.path}/issuer/{issuer_id}/sign-self-issued", body)
        return _text(answer.data, "certificate")

    async def take_signed(self, certificate_pem: str) -> None:
        """Import the certificate of a key of this engine, which makes an issuer of it; twice is once."""
        await self._done("post", f"{self.path}/intermediate/set-signed", {"certificate": certificate_pem})

    async def write_role(self, role: str, *, trust_domain: str, max_ttl: int) -> None:
        """The role that leaves are signed under: names and validity come with each request, our trust domain only."""
        body = {
            "allow_any_name": True,
            "enforce_hostnames": False,
            "cn_validations": ["disabled"],
            "allow_ip_sans": False,
            "allowed_uri_sans": [f"spiffe://{trust_domain}/*"],
            "use_csr_common_name": False,
            "use_csr_sans": False,
            "require_cn": False,
            "key_type": "any",
            "max_ttl": f"{max_ttl}s",
            "no_store": True,
            "generate_lease": False,
            "server_flag": True,
            "client_flag": True,
            "key_usage": ["DigitalSignature", "KeyEncipherment", "DataEncipherment", "KeyAgreement"],
            "basic_constraints_valid_for_non_ca": True,
            "not_before_duration": f"{LEAF_BACKDATED}s",
        }
        await self._done("post", f"{self.path}/roles/{role}", body)

    async def sign_leaves(
        self, issuer_id: str, role: str, leaves: Sequence[LeafRequest], *, deadline: float
    ) -> list[str | CaserverError]:
        """Sign leaves by exactly this issuer: the certificate (PEM) of each, or why there is none."""
        path = f"{self.path}/issuer/{issuer_id}/sign/{role}"
        bodies = [
            {
                "csr": leaf.csr_pem,
                "common_name": leaf.common_name,
                "uri_sans": [leaf.spiffe_uri],
                "exclude_cn_from_sans": True,
                "not_after": _instant(leaf.not_after),
                "format": "pem",
            }
            for leaf in leaves
        ]
        outcomes = await self.session.post_all(path, bodies, namespace=self.namespace, deadline=deadline)
        return [self._signed(outcome, path) for outcome in outcomes]

    def _signed(self, outcome: Answer | ProviderUnavailable, path: str) -> str | CaserverError:
        if isinstance(outcome, ProviderUnavailable):
            return outcome
        try:
            self._accept(outcome, "post", path)
            return _text(outcome.data, "certificate")
        except ProviderRefused as exc:
            return exc

    async def make_default(self, issuer_id: str) -> None:
        """The issuer that the engine shows and uses when none is named."""
        await self._done("post", f"{self.path}/config/issuers", {"default": issuer_id})

    async def delete_issuer(self, issuer_id: str) -> None:
        """Delete an issuer, not its key; twice is once."""
        await self._done("delete", f"{self.path}/issuer/{issuer_id}")

    async def delete_key(self, key_id: str) -> None:
        """Delete a key; twice is once."""
        await self._done("delete", f"{self.path}/key/{key_id}")

    async def _listed(self, what: str) -> Mapping[str, Mapping[str, Any]]:
        answer = await self._call("list", f"{self.path}/{what}")
        if answer.status == HTTPStatus.NOT_FOUND:
            return {}
        self._accept(answer, "list", f"{self.path}/{what}")
        facts = answer.data.get("key_info") or {}
        return {str(each): facts.get(each) or {} for each in answer.data.get("keys") or ()}

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, deadline: float | None = None
    ) -> Answer:
        if deadline is None:
            return await self.session.call(method, path, body, namespace=self.namespace)
        return await self.session.call(method, path, body, namespace=self.namespace, deadline=deadline)

    async def _done(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, deadline: float | None = None
    ) -> Answer:
        answer = await self._call(method, path, body, deadline=deadline)
        self._accept(answer, method, path)
        return answer

    def _accept(self, answer: Answer, method: str, path: str) -> None:
        if not answer.ok:
            raise self._refused(answer, method, path)

    def _refused(self, answer: Answer, method: str, path: str) -> ProviderRefused:
        where = f" in namespace {self.namespace}" if self.namespace else ""
        text = f"Vault at {self.session.endpoint.address} refused {method.upper()} {path}{where}: {answer.why}"
        return ProviderRefused(f"{text}\n{policy_line(method, path)}" if answer.denied else text)


def _mounted(data: Mapping[str, Any], *, managed: bool) -> Mount:
    return Mount(Presence.MOUNTED, str(data.get("type", "")), str(data.get("description", "")), managed=managed)


def _subject(common_name: str, uri: str) -> dict[str, object]:
    return {"common_name": common_name, "uri_sans": [uri], "exclude_cn_from_sans": True}


def _instant(instant: datetime) -> str:
    return f"{instant:%Y-%m-%dT%H:%M:%SZ}"


def _text(data: Mapping[str, Any], key: str) -> str:
    """A PEM of an answer, with one final newline."""
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ProviderRefused(f"Vault answered without the {key} that was asked for; is it a Vault of 1.11 or later?")
    return value.strip() + "\n"
