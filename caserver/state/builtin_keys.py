"""The keys of a Config that only the built-in provider knows: the operator's own root."""

from __future__ import annotations

from caserver.fields import REDACTED, Fields, Secret
from caserver.state.config_reader import ConfigReader

BUILTIN = "consul"
BUILTIN_KEYS = ("PrivateKey", "RootCert")

OwnRoot = tuple[Secret | None, str | None]  # PrivateKey and RootCert


def decode(fields: Fields) -> None:
    """Note values of wrong types."""
    fields.text("RootCert")
    fields.secret("PrivateKey")


def own_root(reader: ConfigReader, stored: OwnRoot) -> OwnRoot:
    """PrivateKey and RootCert, with a redacted or absent secret replaced by the stored one where the rule allows.

    A redacted or absent PrivateKey beside an unchanged RootCert keeps the stored key; so does a redacted one alone.
    """
    if not reader.decoded(*BUILTIN_KEYS):
        return None, None
    root_cert = reader.fields.text("RootCert") or None
    given = reader.fields.secret("PrivateKey")
    redacted = given is not None and given.reveal().strip() == REDACTED
    if given is not None and given.reveal() and not redacted:
        return given, root_cert
    kept, stored_cert = stored
    unchanged = root_cert is not None and same_pem(root_cert, stored_cert)
    if kept is not None and (unchanged or (redacted and root_cert is None)):
        return kept, root_cert
    if redacted:
        why = "and no key is stored to keep" if kept is None else "but RootCert is not the stored one"
        reader.fault("PrivateKey", f"is {REDACTED} {why}", "give the key itself")
    elif root_cert is not None:
        heading = "must provide a private key when providing a root cert"
        reader.fault("PrivateKey", "is missing beside RootCert", "give the key of that certificate", heading)
    return None, root_cert


def same_pem(one: str | None, other: str | None) -> bool:
    """Whether two PEM texts differ in white space only."""
    if one is None or other is None:
        return one is other
    return one.split() == other.split()
