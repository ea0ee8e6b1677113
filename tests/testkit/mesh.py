"""Roots, cross-signed roots and leaves of a made-up mesh, on the ready-made keys."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from caserver.pki import keys
from caserver.pki.certificates import LeafTemplate, cross_sign, make_root
from caserver.pki.leaf_der import Issuer
from caserver.pki.spiffe import ServiceID, leaf_common_name
from tests.testkit.keys import private_key

TRUST_DOMAIN = "11111111-2222-3333-4444-555555555555.consul"
DATACENTER = "dc1"
NOW = datetime(2030, 6, 1, 12, 0, 0, tzinfo=UTC)
LEAF_KEY = "ec-256-b"


def root(key_name: str, *, name: str | None = None, start: datetime = NOW, days: int = 3650) -> str:
    """A generated root on the key called ``key_name``."""
    return make_root(
        private_key(key_name),
        trust_domain=TRUST_DOMAIN,
        common_name=name or f"root of {key_name}",
        serial=7,
        not_before=start - timedelta(minutes=5),
        not_after=start + timedelta(days=days),
    )


def crossed(new: str, *, old: str, old_key: str, start: datetime = NOW, days: float = 7, serial: int = 5) -> str:
    """``new`` cross-signed by ``old``, whose key is called ``old_key``."""
    return cross_sign(
        new,
        issuer_pem=old,
        issuer_key=private_key(old_key),
        serial=serial,
        not_before=start - timedelta(minutes=1),
        not_after=start + timedelta(days=days),
    )


def order(service: str = "web", *, key_name: str = LEAF_KEY, hours: int = 72, start: datetime = NOW) -> LeafTemplate:
    """What a leaf for ``service`` is signed from."""
    begins = int(start.timestamp()) - 60
    return LeafTemplate(
        spiffe_uri=ServiceID(TRUST_DOMAIN, DATACENTER, service).uri,
        common_name=leaf_common_name(service, TRUST_DOMAIN),
        public_key=keys.public_key_der(private_key(key_name).public_key()),
        serial=2**126 + 77,
        not_before=begins,
        not_after=begins + hours * 3600,
    )


def leaf(issuer: str, issuer_key: str, template: LeafTemplate | None = None) -> str:
    """A leaf signed by ``issuer``."""
    return Issuer(issuer, private_key(issuer_key)).sign(template or order())


def fixture_certificates(text: str) -> list[str]:
    """The PEM blocks of a text."""
    return re.findall(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----\n", text)
