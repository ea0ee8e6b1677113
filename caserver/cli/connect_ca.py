"""``caserver connect ca``: the configuration, the roots and the leaves of the CA."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caserver import gojson
from caserver.cli.flags import HTTP_GROUP, Command, Flag, Parsed, Takes, UsageError, client, query
from caserver.cli.output import (
    chosen_format,
    complain,
    failed,
    format_flag,
    left,
    say,
    server_now,
    tabbed,
    table,
)
from caserver.client import Answer, ClientError
from caserver.fields import fold, nearest

_TABLE_JSON_OR_PEM = ("table", "json", "pem")

# What Consul's client writes into a request and prints of an answer, in its order.
_CONFIGURATION: Mapping[str, object] = {
    "Provider": "",
    "Config": None,
    "State": None,
    "CreateIndex": 0,
    "ModifyIndex": 0,
}
_FORCE = "ForceWithoutCrossSigning"


def _get_config(parsed: Parsed, environ: Mapping[str, str]) -> int:
    try:
        document = client(parsed, environ).configuration(**query(parsed)).json()
    except ClientError as exc:
        return failed("Error querying CA configuration", exc)
    say(tabbed(_shown(document)))
    return 0


def _shown(document: Mapping[str, Any]) -> dict[str, Any]:
    """What Consul prints, and where it holds, the wish that writing the file back would otherwise take away."""
    shown: dict[str, Any] = {}
    for key, default in _CONFIGURATION.items():
        if key == "CreateIndex" and document.get(_FORCE) is True:  # its place in the answer
            shown[_FORCE] = True
        shown[key] = document.get(key, default)
    return shown


def _set_config(parsed: Parsed, environ: Mapping[str, str]) -> int:
    name = parsed.values.get("config-file")
    if not name:
        complain("The -config-file flag is required")
        return 1
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as exc:
        return _unreadable("config file", name, exc)
    except UnicodeDecodeError:
        complain("Error parsing config file: not UTF-8 text")
        return 1
    try:
        body = _configuration_body(text, force=parsed.switch("force-without-cross-signing"))
    except ValueError as exc:
        complain(f"Error parsing config file: {exc}")
        return 1
    try:
        client(parsed, environ).set_configuration(body, **query(parsed))
    except ClientError as exc:
        return failed("Error setting CA configuration", exc)
    say("Configuration updated!")
    return 0


def _unreadable(what: str, name: str, exc: OSError) -> int:
    complain(f"Error reading {what}: open {name}: {(exc.strerror or str(exc)).lower()}")
    if name == "-":
        complain("To read standard input, name the file /dev/stdin")
    return 1


def _configuration_body(text: str, *, force: bool) -> str:
    """The request for a configuration file; ValueError as Go words it. Keys that Consul's client drops are named."""
    try:
        given = gojson.decode(text)
    except ValueError as exc:
        raise ValueError("unexpected end of JSON input" if str(exc) in ("EOF", "unexpected EOF") else exc) from exc
    if not isinstance(given, dict):
        raise ValueError("a CA configuration is a JSON object")  # noqa: TRY004 - callers report every ValueError alike
    known = {fold(key): key for key in (*_CONFIGURATION, _FORCE)}
    body: dict[str, Any] = dict(_CONFIGURATION)
    for key, value in given.items():
        if fold(key) in known:
            body[known[fold(key)]] = value
        else:
            near = nearest(key, list(known.values()))
            complain(f'Ignoring the unknown key "{key}"' + (f": did you mean {near}?" if near else ""))
    if force:
        body[_FORCE] = True
    if isinstance(body["Config"], dict):
        body["Config"] = dict(sorted(body["Config"].items()))
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False) + "\n"


def _roots(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_TABLE_JSON_OR_PEM)
    try:
        answer = client(parsed, environ).roots(**query(parsed))
        document = answer.json()
    except ClientError as exc:
        return failed("Error querying CA roots", exc)
    roots = document.get("Roots") or []
    if layout == "json":
        say(tabbed(document))
    elif layout == "pem":
        say("".join(_ended(root["RootCert"]) for root in roots))
    else:
        say(f"Trust domain: {document.get('TrustDomain', '')}\n\n")
        say(table(_root_rows(roots, answer)))
    return 0


def _root_rows(roots: list[Any], answer: Answer) -> list[list[str]]:
    now = server_now(answer.headers)
    rows = [["ID", "Active", "Key", "Not After", "Left", "Cross-signed"]]
    for root in sorted(roots, key=lambda each: not each.get("Active")):
        key = f"{root.get('PrivateKeyType', '')} {root.get('PrivateKeyBits', '')}"
        not_after = str(root.get("NotAfter", ""))
        cross_signed = str(len(root.get("IntermediateCerts") or ()))
        active = str(bool(root.get("Active"))).lower()
        rows.append([str(root.get("ID", "")), active, key, not_after, left(not_after, now), cross_signed])
    return rows


def _leaf(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_TABLE_JSON_OR_PEM)
    if len(parsed.arguments) != 1:
        raise UsageError("name one service: caserver connect ca leaf <service>")
    try:
        answer = client(parsed, environ).leaf(parsed.arguments[0], **query(parsed))
        document = answer.json()
    except ClientError as exc:
        return failed("Error getting the leaf certificate", exc)
    return _show_leaf(parsed, layout, document, answer)


def _sign(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_TABLE_JSON_OR_PEM)
    name = parsed.values.get("csr-file") or (parsed.arguments[0] if parsed.arguments else "")
    if not name:
        raise UsageError("The -csr-file flag is required")
    try:
        csr = Path(name).read_text(encoding="ascii")
    except OSError as exc:
        return _unreadable("CSR file", name, exc)
    except UnicodeDecodeError:
        complain(f"Error reading CSR file: {name} is not PEM; convert it with: openssl req -inform DER -in {name}")
        return 1
    try:
        answer = client(parsed, environ).sign(csr, **query(parsed))
        document = answer.json()
    except ClientError as exc:
        return failed("Error signing the certificate request", exc)
    return _show_leaf(parsed, layout, document, answer)


def _show_leaf(parsed: Parsed, layout: str, document: Any, answer: Answer) -> int:
    certificate, key = _ended(document.get("CertPEM", "")), _ended(document.get("PrivateKeyPEM", ""))
    outputs = ((parsed.values.get("cert-out"), certificate, 0o644), (parsed.values.get("key-out"), key, 0o600))
    try:
        for name, text, mode in outputs:
            if name:
                _write(Path(name), text, mode)
    except OSError as exc:
        complain(f"Error writing {exc.filename}: {exc.strerror}")
        return 1
    if layout == "json":
        say(tabbed(document))
    elif layout == "pem":
        say(certificate + key)
    else:
        not_after = str(document.get("ValidBefore", ""))
        count = certificate.count("BEGIN CERTIFICATE")
        rows = [
            ["Service", str(document.get("Service", ""))],
            ["URI", str(document.get("ServiceURI", ""))],
            ["Serial", str(document.get("SerialNumber", ""))],
            ["Not Before", str(document.get("ValidAfter", ""))],
            ["Not After", not_after],
            ["Left", left(not_after, server_now(answer.headers))],
            ["Chain", f"{count} certificate{'' if count == 1 else 's'} (-format=pem shows the chain)"],
        ]
        say(table(rows))
    return 0


def _write(path: Path, text: str, mode: int) -> None:
    """Put ``text`` at ``path`` whole or not at all, never readable beyond ``mode``."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    draft.replace(path)


def _ended(pem: str) -> str:
    return pem if not pem or pem.endswith("\n") else pem + "\n"


_CERT_OUT = Flag("cert-out", "File to write the certificate and its chain to.", placeholder="file")
_KEY_OUT = Flag("key-out", "File to write the private key to, readable by its owner only.", placeholder="file")

COMMANDS = {
    command.words: command
    for command in (
        Command(
            words="connect ca get-config",
            usage="[options]",
            description="Displays the current Connect Certificate Authority (CA) configuration.",
            example="caserver connect ca get-config > ca.json",
            flags=(HTTP_GROUP,),
            run=_get_config,
        ),
        Command(
            words="connect ca set-config",
            usage="[options]",
            description="Modifies the current Connect Certificate Authority (CA) configuration.\n\nThe file that get-config "
            "wrote is a valid input; with its ModifyIndex the change is refused if somebody else changed the "
            "configuration meanwhile.",
            example="caserver connect ca set-config -config-file=ca.json",
            flags=(
                HTTP_GROUP,
                (
                    "Command Options",
                    (
                        Flag("config-file", "The path to the config file to use."),
                        Flag(
                            "force-without-cross-signing",
                            "Rotate without a cross-signed certificate. Clients that have not fetched the new root "
                            "refuse the new leaves until they have.",
                            takes=Takes.NOTHING,
                        ),
                    ),
                ),
            ),
            run=_set_config,
        ),
        Command(
            words="connect ca roots",
            usage="[options]",
            description="Displays the trust bundle: every root certificate that leaves in use may lead to.",
            example="caserver connect ca roots -format=pem > roots.pem",
            flags=(HTTP_GROUP, ("Command Options", (format_flag(*_TABLE_JSON_OR_PEM),))),
            run=_roots,
        ),
        Command(
            words="connect ca leaf",
            usage="[options] <service>",
            description="Gets the certificate of a service, with its private key, from the agent.",
            example="caserver connect ca leaf -cert-out=web.crt -key-out=web.key web",
            flags=(HTTP_GROUP, ("Command Options", (format_flag(*_TABLE_JSON_OR_PEM), _CERT_OUT, _KEY_OUT))),
            run=_leaf,
        ),
        Command(
            words="connect ca sign",
            usage="[options]",
            description="Has a certificate signing request signed. The private key stays where it was made.",
            example="caserver connect ca sign -csr-file=web.csr -cert-out=web.crt",
            flags=(
                HTTP_GROUP,
                (
                    "Command Options",
                    (
                        Flag("csr-file", "The certificate signing request, in PEM.", placeholder="file"),
                        format_flag(*_TABLE_JSON_OR_PEM),
                        _CERT_OUT,
                    ),
                ),
            ),
            run=_sign,
        ),
    )
}
