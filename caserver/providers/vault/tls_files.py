"""The files by which this node and a Vault server know each other: what they hold, and a TLS context made of it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from caserver.errors import InvalidConfig
from caserver.fields import Secret
from caserver.pki.tls import backend_context
from caserver.providers.vault.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Material:
    """What trust is made of, PEM; two that are equal make equal contexts."""

    authorities: tuple[str, ...] = field(default=(), repr=False)  # none: those of the machine
    certificate: str | None = field(default=None, repr=False)
    key: Secret | None = None


def read_material(endpoint: Endpoint) -> Material:
    """What the endpoint's files hold now; InvalidConfig names one that cannot be read."""
    authorities = [endpoint.ca_cert] if endpoint.ca_cert else []
    if endpoint.ca_file is not None:
        authorities.append(text_of(endpoint.ca_file, "CAFile"))
    if endpoint.ca_path is not None:
        authorities += [text_of(path, "CAPath") for path in _files_in(endpoint.ca_path)]
    return Material(
        tuple(authorities),
        None if endpoint.cert_file is None else text_of(endpoint.cert_file, "CertFile"),
        None if endpoint.key_file is None else Secret(text_of(endpoint.key_file, "KeyFile")),
    )


def context_of(material: Material, *, verify: bool) -> ssl.SSLContext:
    """A context for connecting to the server; InvalidConfig if the material does not fit together."""
    try:
        return backend_context(
            ca_pems=material.authorities, cert_chain_pem=material.certificate, key_pem=material.key, verify=verify
        )
    except (ssl.SSLError, ValueError):
        raise InvalidConfig(
            "error configuring provider: the TLS files for Vault cannot be used\n"
            "CAFile, CAPath, CACert, CertFile, KeyFile: one holds no PEM, or key and certificate do not belong together"
        ) from None


def text_of(path: Path, key: str) -> str:
    """What a file holds that ``key`` of a configuration names; InvalidConfig if it cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise InvalidConfig(f"{key}: {path} cannot be read ({exc.strerror})") from exc
    except UnicodeDecodeError:
        raise InvalidConfig(f"{key}: {path} is not text") from None


def _files_in(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as exc:
        raise InvalidConfig(f"CAPath: {directory} cannot be read ({exc.strerror})") from exc
