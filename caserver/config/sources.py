"""Where settings come from, laid over each other: files, then the environment, then flags, pieces of HCL among them last.

The later wins.

Knows nothing of what a key means. Every value keeps its origin (file and line, variable or flag), so that a fault can
say where to mend it. Tables merge key by key; everything else is replaced whole.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from caserver.config import document
from caserver.config.document import KeyPath
from caserver.fields import Fault, fold, nearest

PREFIX = "CASERVER_"
# Read by the client commands, not by the agent.
_CLIENT_NAMES = ("ADDR", "TOKEN", "TOKEN_FILE", "SSL", "SSL_VERIFY")
_CLIENT_TLS_NAMES = ("CACERT", "CAPATH", "CLIENT_CERT", "CLIENT_KEY", "TLS_SERVER_NAME")
CLIENT_VARIABLES = frozenset(
    [PREFIX + "HTTP_" + each for each in _CLIENT_NAMES] + [PREFIX + each for each in _CLIENT_TLS_NAMES]
)
# Kubernetes gives every container such variables for a Service called "caserver"; they are nobody's mistake.
_SERVICE_LINK = re.compile(r"(^|_)(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP)\w*)?)$")


@dataclass(frozen=True, slots=True)
class Keys:
    """What the reader of the settings knows: scalar keys by dotted path, and tables whose keys it does not fix."""

    scalars: Collection[str]
    lists: Collection[str]  # those scalars that may be lists: commas or JSON in the environment
    open_tables: Collection[str]  # merged by what the spellings of a key have in common; JSON in the environment


@dataclass(slots=True)
class Settings:
    """The merged tree. ``incomplete`` says that a file could not be read whole: a key may only seem to be missing."""

    keys: Keys
    values: dict[str, object] = field(default_factory=dict, repr=False)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    incomplete: bool = False

    def lay(self, path: KeyPath, value: object, origin: Callable[[KeyPath], str]) -> None:
        """Lay ``value`` over what is there; a mapping merges into the table at ``path``."""
        if isinstance(value, Mapping):
            self._table(path, origin)
            for key, each in value.items():
                self.lay((*path, key), each, origin)
            return
        table = self._table(path[:-1], origin)
        if ".".join(path[:-1]) in self.keys.open_tables:
            self._drop_other_spellings(table, path, origin(path))
        table[path[-1]] = value
        self.origins[path] = origin(path)

    def located(self, fault: Fault) -> Fault:
        """``fault`` of a dotted key, with the place that the value came from in front."""
        path = tuple(fault.field.partition("[")[0].split("."))
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return replace(fault, field=f"{self.origins[path[:length]]}: {fault.field}")
        return fault

    def _table(self, path: KeyPath, origin: Callable[[KeyPath], str]) -> dict[str, object]:
        table = self.values
        for index, key in enumerate(path):
            inner = table.get(key)
            if not isinstance(inner, dict):
                inner = {}
                table[key] = inner
                self.origins[path[: index + 1]] = origin(path[: index + 1])
            table = inner
        return table

    def _drop_other_spellings(self, table: dict[str, object], path: KeyPath, origin: str) -> None:
        # Within one source two spellings of one key are a fault that the reader finds; a later source replaces either.
        for key in [key for key in table if fold(key) == fold(path[-1]) and key != path[-1]]:
            if _source(self.origins[(*path[:-1], key)]) != _source(origin):
                del table[key]


def gather(
    paths: Sequence[str],
    *,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    keys: Keys,
    pieces: Sequence[str] = (),
    file_format: str | None = None,
) -> Settings:
    """Read files (or directories of files) in order, the environment, ``flags`` (dotted key to value), ``pieces`` of HCL.

    ``file_format`` (hcl or json) is that of every file, whatever its name.
    """
    settings = Settings(keys)
    for path in _files(paths, settings, file_format):
        _overlay_file(settings, path, file_format)
    _overlay_environment(settings, environ)
    for name, value in flags.items():
        settings.lay(tuple(name.split(".")), value, _always("flag"))
    for number, text in enumerate(pieces, 1):
        _overlay(settings, document.parse_hcl("-hcl" if len(pieces) == 1 else f"-hcl (number {number})", text))
    return settings


def _files(paths: Sequence[str], settings: Settings, file_format: str | None) -> list[Path]:
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if not path.is_dir():
            found.append(path)
            continue
        try:
            inside = document.files_of(path, of_any_name=file_format is not None)
        except OSError as exc:
            settings.faults.append(Fault(name, f"cannot be listed ({os.strerror(exc.errno or 0)})", "check the path"))
            settings.incomplete = True
            continue
        if not inside:
            settings.warnings.append(f"{name}: holds no *.hcl or *.json file")
        found.extend(inside)
    return found


def _overlay_file(settings: Settings, path: Path, file_format: str | None) -> None:
    read = document.read(path, file_format=file_format)
    _overlay(settings, read)
    if "cluster_secret" in read.values or _holds_key(read.values):
        _warn_of_readers(path, settings)


def _overlay(settings: Settings, read: document.Document) -> None:
    settings.faults.extend(read.faults)
    settings.incomplete = settings.incomplete or bool(read.faults)

    def origin(key: KeyPath) -> str:
        line = read.lines.get(key)
        return f"{read.name}:{line}" if line else read.name

    settings.lay((), read.values, origin)


def _holds_key(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_key(each) for each in value.values())
    return isinstance(value, str) and "PRIVATE KEY-----" in value


def _warn_of_readers(path: Path, settings: Settings) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        settings.warnings.append(f"{path}: holds a secret and others may read it ({mode:04o}); run chmod 600 {path}")


def _source(origin: str) -> str:
    return re.sub(r":\d+$", "", origin)


def _overlay_environment(settings: Settings, environ: Mapping[str, str]) -> None:
    scalars = {_variable(key): key for key in settings.keys.scalars}
    tables = {_variable(key): key for key in settings.keys.open_tables}
    for name in sorted(environ):
        value = environ[name]
        if not name.startswith(PREFIX) or not value or name in CLIENT_VARIABLES:
            continue
        table = next((each for each in tables if name.startswith(each + "_")), None)
        if name in scalars:
            key = scalars[name]
            items = as_list(value) if key in settings.keys.lists else value
            settings.lay(tuple(key.split(".")), items, _always(name))
        elif name in tables:
            _overlay_table(settings, tables[name], value, origin=name)
        elif table is not None:
            path = (*tables[table].split("."), name.removeprefix(table + "_").lower())
            settings.lay(path, value, _always(name))
        elif not _SERVICE_LINK.search(name):
            near = nearest(name, [*scalars, *tables])
            settings.warnings.append(f"{name}: no such setting, ignored" + (f"; did you mean {near}?" if near else ""))


def _always(origin: str) -> Callable[[KeyPath], str]:
    return lambda _: origin


def _variable(key: str) -> str:
    return PREFIX + key.replace(".", "_").upper()


def _overlay_table(settings: Settings, key: str, value: str, *, origin: str) -> None:
    read = document.parse_json(origin, value)
    settings.faults.extend(read.faults)
    if not read.faults:
        settings.lay(tuple(key.split(".")), read.values, _always(origin))


def as_list(text: str) -> object:
    """A list written in one variable: JSON, or items separated by commas."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return [item.strip() for item in text.split(",") if item.strip()]
