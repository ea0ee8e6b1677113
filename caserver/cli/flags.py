"""Flags in Consul's spelling (``-x=y``, ``-x y``, ``--x``), their help texts, and the flags that every client command has."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from caserver.client import Client, ClientSettings
from caserver.client.client import DEFAULT_ADDRESS
from caserver.fields import Secret

_WIDTH = 74


class Takes(Enum):
    """What follows a flag."""

    VALUE = auto()
    VALUES = auto()  # may be given several times
    NOTHING = auto()  # present or not; =true and =false may be written


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag; ``name`` without its dash."""

    name: str
    help: str
    takes: Takes = Takes.VALUE
    placeholder: str = "value"
    list_of: str = ""  # the flag whose list the values join, so that the order between the two is kept


class UsageError(Exception):
    """The command line cannot be understood."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was given."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold a token
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    help_wanted: bool = False

    def switch(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.switches.get(name, False)


@dataclass(frozen=True, slots=True)
class Command:
    """One verb: its texts, its flags and what it does."""

    words: str  # "connect ca roots"
    usage: str  # what follows the words
    description: str
    example: str
    flags: Sequence[tuple[str, Sequence[Flag]]]  # titled groups
    run: Callable[[Parsed, Mapping[str, str]], int]  # parsed flags, environment -> exit code

    def parse(self, arguments: Sequence[str]) -> Parsed:
        """Understand the words after the verb; UsageError in Go's wording."""
        return parse(arguments, [flag for _, group in self.flags for flag in group])

    def help(self) -> str:
        """The text of ``-h``."""
        parts = [f"Usage: caserver {self.words} {self.usage}", _indented(self.description, 2)]
        parts.append(f"  Example:\n\n      $ {self.example}")
        for title, group in self.flags:
            parts.append(title)
            parts.extend(_flag_help(flag) for flag in group)
        return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str], flags: Sequence[Flag]) -> Parsed:
    """Sort ``arguments`` into flags and the rest; after ``--`` everything is the rest."""
    known = {flag.name: flag for flag in flags}
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    switches: dict[str, bool] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            rest.extend(waiting)
            break
        if not word.startswith("-") or word == "-":
            rest.append(word)
            continue
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        flag = known.get(name)
        if flag is None and name in ("h", "help"):
            return Parsed(help_wanted=True)
        if flag is None:
            raise UsageError(_unknown(name, known))
        if flag.takes is Takes.NOTHING:
            switches[name] = _boolean(name, value) if equals else True
            continue
        if not equals:
            if not waiting:
                raise UsageError(f"flag needs an argument: -{name}")
            value = waiting.pop(0)
        if flag.takes is Takes.VALUES:
            lists.setdefault(flag.list_of or name, []).append(value)
        else:
            values[name] = value
    return Parsed(values, lists, switches, rest)


def _unknown(name: str, known: Mapping[str, Flag]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"flag provided but not defined: -{name}" + (f" (did you mean -{near[0]}?)" if near else "")


def _boolean(name: str, value: str) -> bool:
    # The spellings of Go's strconv.ParseBool.
    if value in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if value in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise UsageError(f'invalid boolean value "{value}" for -{name}: parse error')


def _flag_help(flag: Flag) -> str:
    shown = f"  -{flag.name}" + ("" if flag.takes is Takes.NOTHING else f"=<{flag.placeholder}>")
    return f"{shown}\n{_indented(flag.help, 5)}"


def _indented(text: str, columns: int) -> str:
    margin = " " * columns
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        textwrap.fill(each, _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
        for each in paragraphs
    )


HTTP_FLAGS: tuple[Flag, ...] = (
    Flag("ca-file", "Path to a CA file to use for TLS when communicating with the agent. Also CONSUL_CACERT."),
    Flag("ca-path", "Path to a directory of CA certificates to use for TLS. Also CONSUL_CAPATH."),
    Flag("client-cert", "Path to a client certificate to use when the agent requires one. Also CONSUL_CLIENT_CERT."),
    Flag("client-key", "Path to the key of the client certificate. Also CONSUL_CLIENT_KEY."),
    Flag("datacenter", "Name of the datacenter to query. Defaults to that of the queried agent."),
    Flag(
        "http-addr",
        "The address and port of the agent, as host:port or as a URL. Also CONSUL_HTTP_ADDR. The default is "
        f"http://{DEFAULT_ADDRESS}. The scheme is HTTPS if CONSUL_HTTP_SSL=true.",
        placeholder="address",
    ),
    Flag(
        "stale",
        "Permit any server (non-leader) to respond. This allows for lower latency, but can result in stale data. It has "
        "no effect on operations that change something.",
        takes=Takes.NOTHING,
    ),
    Flag("tls-server-name", "The server name to verify when connecting via TLS. Also CONSUL_TLS_SERVER_NAME."),
    Flag(
        "token",
        "ACL token to use in the request. Also CONSUL_HTTP_TOKEN, which unlike a flag is not seen in the process list.",
    ),
    Flag("token-file", "File containing the ACL token. Also CONSUL_HTTP_TOKEN_FILE."),
)
HTTP_GROUP: tuple[str, Sequence[Flag]] = (
    "HTTP API Options (every CONSUL_ variable has a CASERVER_ twin, which wins)",
    HTTP_FLAGS,
)


def client(parsed: Parsed, environ: Mapping[str, str]) -> Client:
    """The client that flags and environment ask for; UsageError if a token file cannot be read."""

    def either(flag: str, variable: str) -> str | None:
        return parsed.values.get(flag) or _variable(environ, variable)

    def path(flag: str, variable: str) -> Path | None:
        text = either(flag, variable)
        return Path(text) if text else None

    settings = ClientSettings(
        address=either("http-addr", "HTTP_ADDR") or DEFAULT_ADDRESS,
        token=_token(parsed, environ),
        https=_is_true(_variable(environ, "HTTP_SSL")),
        ca_file=path("ca-file", "CACERT"),
        ca_path=path("ca-path", "CAPATH"),
        client_cert=path("client-cert", "CLIENT_CERT"),
        client_key=path("client-key", "CLIENT_KEY"),
        tls_server_name=either("tls-server-name", "TLS_SERVER_NAME"),
        verify=not _is_false(_variable(environ, "HTTP_SSL_VERIFY")),
    )
    return Client(settings)


def query(parsed: Parsed) -> dict[str, str]:
    """The query options that flags ask for."""
    options = {"dc": parsed.values["datacenter"]} if parsed.values.get("datacenter") else {}
    return options | ({"stale": ""} if parsed.switch("stale") else {})


def _token(parsed: Parsed, environ: Mapping[str, str]) -> Secret | None:
    # Consul's order: the file of a flag or variable beats the token itself.
    file = parsed.values.get("token-file") or _variable(environ, "HTTP_TOKEN_FILE")
    if file:
        try:
            return Secret(Path(file).read_text().strip())
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"Error loading token file {file}: {exc}") from exc
    token = parsed.values.get("token") or _variable(environ, "HTTP_TOKEN")
    return Secret(token) if token else None


def _variable(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(f"CASERVER_{name}") or environ.get(f"CONSUL_{name}")


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "t", "true")


def _is_false(text: str | None) -> bool:
    return (text or "").lower() in ("0", "f", "false")
