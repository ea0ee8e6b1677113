"""The requests by which each auth method trades what it knows for a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from caserver.errors import InvalidConfig
from caserver.fields import Fault, fault_text
from caserver.providers.vault.endpoint import Login


@dataclass(frozen=True, slots=True)
class LoginRequest:
    """What to post where; ``body`` holds secrets."""

    path: str
    body: Mapping[str, str] = field(repr=False)


def login_request(login: Login, params: Mapping[str, str]) -> LoginRequest:
    """The login of ``login`` with its parameters, files read; InvalidConfig names what is missing."""
    build = _METHODS.get(login.type)
    if build is None:
        known = " or ".join(f'"{name}"' for name in sorted(_METHODS))
        raise InvalidConfig(fault_text([Fault("AuthMethod.Type", f'"{login.type}" is not known', f"use {known}")]))
    missing = [key for key in REQUIRED[login.type] if not params.get(key)]
    if missing:
        raise InvalidConfig(
            fault_text([Fault(f"AuthMethod.Params.{key}", f"is what {login.type} needs", "give it") for key in missing])
        )
    return build(f"auth/{login.mount_path.strip('/')}/login", params)


def _picked(*keys: str) -> Callable[[str, Mapping[str, str]], LoginRequest]:
    def build(path: str, params: Mapping[str, str]) -> LoginRequest:
        return LoginRequest(path, {key: params[key] for key in keys if key in params})

    return build


def _userpass(path: str, params: Mapping[str, str]) -> LoginRequest:
    return LoginRequest(f"{path}/{params['username']}", {"password": params["password"]})


REQUIRED: Mapping[str, tuple[str, ...]] = {
    "approle": ("role_id",),
    "userpass": ("username", "password"),
    "jwt": ("jwt",),
    "kubernetes": ("role", "jwt"),
    "cert": (),
}
_METHODS: Mapping[str, Callable[[str, Mapping[str, str]], LoginRequest]] = {
    "approle": _picked("role_id", "secret_id"),
    "userpass": _userpass,
    "jwt": _picked("role", "jwt"),
    "kubernetes": _picked("role", "jwt"),
    "cert": _picked("name"),  # the certificate itself is shown in the TLS handshake
}
