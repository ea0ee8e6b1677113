"""Secrets that cannot be shown by accident, and the faults of an untrusted mapping, collected instead of thrown.

``Fields`` reads one mapping that somebody else wrote (the Config object of a request, a block of a file): it forgives
spelling (``LeafCertTTL``, ``leafCertTTL`` and ``leaf_cert_ttl`` are one key) and Consul's weak types (``"50"`` is a
number, a bare number is nanoseconds where a duration is meant), notes every fault and goes on, so that the writer
learns of all of them at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


class Secret:
    """A text that must not appear in output: ``repr``, ``str`` and formatting show ``<redacted>``."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself; only providers, the keyring and the client that sends it have a reason to call this."""
        return self._value

    def __repr__(self) -> str:
        return REDACTED

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


REDACTED = "<redacted>"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with an input: where, what was given (never of a secret) and what to do.

    ``heading`` is the sentence that Consul has for it, if Consul has one: the first line of the answer when this fault
    is the first.
    """

    field: str
    problem: str
    remedy: str = ""
    heading: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


def fault_text(faults: Sequence[Fault]) -> str:
    """All faults as one message: the first one's heading, then a line for every fault."""
    lines = [str(fault) for fault in faults]
    if faults and faults[0].heading:
        lines.insert(0, faults[0].heading)
    return "\n".join(lines)


def fold(key: str) -> str:
    """What the spellings of one key have in common: ``LeafCertTTL`` and ``leaf_cert_ttl`` fold to the same text."""
    return key.replace("_", "").replace("-", "").lower()


def nearest(key: str, known: Collection[str]) -> str | None:
    """The known key that ``key`` was probably meant to be, or None."""
    by_fold = {fold(each): each for each in known}
    found = difflib.get_close_matches(fold(key), sorted(by_fold), n=1, cutoff=0.6)
    return by_fold[found[0]] if found else None


NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, micro sign
    "μs": 10**3,  # U+03BC, Greek mu
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION_MAX = 2**63 - 1  # nanoseconds; Go's time.Duration is an int64
_DURATION_PART = re.compile(r"(?P<whole>[0-9]*)(?P<point>\.(?P<fraction>[0-9]*))?(?P<unit>[^.0-9]*)")


def go_duration(text: str) -> float:
    """Seconds of a Go duration such as ``1h30m`` or ``-1.5s``; ValueError in the words of Go's ``time.ParseDuration``."""
    body = text[1:] if text[:1] in ("-", "+") else text
    if body == "0":
        return 0.0
    if not body:
        raise ValueError(f'time: invalid duration "{text}"')
    total, at = 0, 0
    while at < len(body):
        part = _DURATION_PART.match(body, at)
        if part is None or not (part["whole"] or part["fraction"]):
            raise ValueError(f'time: invalid duration "{text}"')
        total += _nanoseconds(part, text)
        at = part.end()
        if total > _DURATION_MAX:
            raise ValueError(f'time: invalid duration "{text}"')
    return (-total if text.startswith("-") else total) / 10**9


def _nanoseconds(part: re.Match[str], text: str) -> int:
    if not part["unit"]:
        raise ValueError(f'time: missing unit in duration "{text}"')
    if part["unit"] not in NANOSECONDS:
        raise ValueError(f'time: unknown unit "{part["unit"]}" in duration "{text}"')
    scale = NANOSECONDS[part["unit"]]
    whole = part["whole"].lstrip("0")
    if len(whole) > len(str(_DURATION_MAX)):
        raise ValueError(f'time: invalid duration "{text}"')
    fraction = (part["fraction"] or "")[:18]  # further digits are below any unit's nanosecond
    below = int(fraction or "0") * scale // int("1" + "0" * len(fraction))
    return int(whole or "0") * scale + below


def format_go_duration(seconds: float) -> str:
    """``seconds`` as Go prints a duration of at least a second: ``72h0m0s``, ``1m30.5s``; ``0s`` for zero."""
    sign = "-" if seconds < 0 else ""
    nanoseconds = round(abs(seconds) * 10**9)
    whole, fraction = divmod(nanoseconds, 10**9)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    last = f"{rest}" + (f".{fraction:09d}".rstrip("0") if fraction else "") + "s"
    if hours:
        return f"{sign}{hours}h{minutes}m{last}"
    return f"{sign}{minutes}m{last}" if minutes else sign + last


def go_type(value: object) -> str:
    """The name that Go's decoders have for the type of a decoded JSON value."""
    match value:
        case None:
            return "<nil>"
        case bool():
            return "bool"
        case int() | float():
            return "float64"
        case str():
            return "string"
        case Mapping():
            return "map[string]interface {}"
        case _:
            return "[]interface {}"


def _finite(value: float) -> bool:
    """Whether ``value`` fits a float (an int of any size may come in)."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class Fields:
    """One pass over an untrusted mapping.

    Ask for every key by its canonical name, then call ``finish``; ``faults`` then holds everything that was wrong, in
    the order of asking, each named ``where.key`` by the spelling that was given. A key that is absent or null yields
    the default. A value with a fault yields the default too, so that reading can go on.
    """

    def __init__(self, given: Mapping[str, object], *, where: str = "", exact: bool = False) -> None:
        """``exact`` accepts only the canonical spelling of a key (other spellings are then unknown keys)."""
        self._where = where
        self._fold = str if exact else fold
        self._given: dict[str, tuple[str, object]] = {}
        self._asked: dict[str, str] = {}
        self.faults: list[Fault] = []
        for key, value in given.items():
            folded = self._fold(key)
            if folded in self._given:
                first = self._given[folded][0]
                self.fault(key, f'the same key is given as "{first}" too', "give it once", name=key)
            else:
                self._given[folded] = (key, value)

    def raw(self, key: str) -> object:
        """The value as it was given, or None."""
        folded = self._fold(key)
        self._asked[folded] = key
        return self._given.get(folded, (key, None))[1]

    def spelling(self, key: str) -> str | None:
        """How ``key`` was spelt, or None if it is absent."""
        found = self._given.get(self._fold(key))
        return None if found is None else found[0]

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw(key) is not None

    def fault(self, key: str, problem: str, remedy: str = "", *, heading: str = "", name: str | None = None) -> None:
        """Note a fault of ``key``; for checks that only the reader's owner knows."""
        shown = name or self.spelling(key) or key
        self.faults.append(Fault(f"{self._where}.{shown}" if self._where else shown, problem, remedy, heading))

    def text(self, key: str, default: str | None = None, *, one_of: Collection[str] = ()) -> str | None:
        """A string; ``one_of`` lists the only values allowed."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self._wrong_type(key, "string", value, f'write it in quotes, {self.spelling(key)} = "..."')
            return default
        if one_of and value not in one_of:
            self.fault(key, f'"{value}" is not known', "use " + " or ".join(f'"{each}"' for each in one_of))
            return default
        return value

    def secret(self, key: str) -> Secret | None:
        """A string that no message may show."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self._wrong_type(key, "string", value, "write it in quotes")
            return None
        return Secret(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A boolean; the strings ``true`` and ``false`` count (environment variables have no other way)."""
        value = self.raw(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        self._wrong_type(key, "bool", value, "use true or false")
        return default

    def integer(self, key: str, default: int, *, low: int | None = None, high: int | None = None) -> int:
        """A whole number, or a string that holds one, within ``low .. high``."""
        value = self._number(key, "int")
        if value is None:
            return default
        if not float(value).is_integer():
            self.fault(key, f"{value} is not a whole number", "leave the fraction out")
            return default
        return int(value) if self._within(key, value, low, high) else default

    def number(self, key: str, default: float, *, low: float | None = None, high: float | None = None) -> float:
        """A number, or a string that holds one, within ``low .. high``."""
        value = self._number(key, "float")
        if value is None or not self._within(key, value, low, high):
            return default
        return float(value)

    def duration(self, key: str, default: float, *, low: float | None = None, high: float | None = None) -> float:
        """Seconds, given as a Go duration or as a number of nanoseconds; ``low`` and ``high`` are seconds.

        As in Consul a boolean counts as 0 or 1 nanoseconds, which no lower bound lets pass.
        """
        value = self.raw(key)
        match value:
            case None:
                return default
            case str():
                seconds = self._parsed_duration(key, value)
            case int() | float() if _finite(value) and abs(value) <= _DURATION_MAX:
                seconds = value / 10**9
            case _:
                self._wrong_type(key, "time.Duration", value, 'use a duration such as "72h"')
                return default
        if seconds is None or not self._duration_within(key, seconds, low, high):
            return default
        return seconds

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; a single string counts as a list of one."""
        value = self.raw(key)
        if value is None:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            self._wrong_type(key, "[]string", value, "give a list of strings")
            return ()
        return tuple(str(item) for item in items)

    def mapping(self, key: str) -> Mapping[str, object]:
        """A nested object, empty if absent."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self._wrong_type(key, "map", value, "give an object { ... }")
            return {}
        return value

    def inner(self, key: str) -> Fields:
        """A reader of the nested object, empty if it is absent; its faults are noted here."""
        shown = self.spelling(key) or key
        reader = Fields(self.mapping(key), where=f"{self._where}.{shown}" if self._where else shown)
        self.faults.extend(reader.faults)
        reader.faults = self.faults
        return reader

    def finish(self, *, also_known: Collection[str] = ()) -> None:
        """Note every key that nobody asked for, naming the nearest key that is known."""
        known = {*self._asked.values(), *also_known}
        allowed = {self._fold(key) for key in known}
        for folded, (key, _) in self._given.items():
            if folded in allowed:
                continue
            near = nearest(key, known)
            remedy = f'did you mean "{near}"?' if near else "known are " + ", ".join(sorted(known))
            self.fault(key, "unknown key", remedy)

    def _number(self, key: str, kind: str) -> float | None:
        value = self.raw(key)
        match value:
            case None:
                return None
            case bool():
                return int(value)
            case int() | float() if _finite(value):
                return value
            case str():
                return self._parsed_number(key, value, kind)
            case _:
                self._wrong_type(key, kind, value, "give a number")
                return None

    def _parsed_number(self, key: str, text: str, kind: str) -> float | None:
        pattern = r"[+-]?[0-9]{1,18}" if kind == "int" else r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?"
        if re.fullmatch(pattern, text, re.ASCII):
            value = int(text) if kind == "int" else float(text)
            if _finite(value):
                return value
        call = "strconv.ParseInt" if kind == "int" else "strconv.ParseFloat"
        problem = f"cannot parse '{key}' as {kind}: {call}: parsing \"{text}\": invalid syntax"
        self.fault(key, f'"{text}" is not a number', "give a number", heading=problem)
        return None

    def _parsed_duration(self, key: str, text: str) -> float | None:
        try:
            return go_duration(text)
        except ValueError as exc:
            heading = f"error decoding '{key}': {exc}"
            self.fault(key, str(exc), 'use hours, minutes and seconds, such as "72h" or "1h30m"', heading=heading)
            return None

    def _within(self, key: str, value: float, low: float | None, high: float | None) -> bool:
        if low is not None and value < low:
            self.fault(key, f"{value} is too small", f"use at least {low}")
            return False
        if high is not None and value > high:
            self.fault(key, f"{value} is too large", f"use at most {high}")
            return False
        return True

    def _duration_within(self, key: str, seconds: float, low: float | None, high: float | None) -> bool:
        if low is not None and seconds < low:
            self.fault(key, f"{format_go_duration(seconds)} is too short", f"use at least {format_go_duration(low)}")
            return False
        if high is not None and seconds > high:
            self.fault(key, f"{format_go_duration(seconds)} is too long", f"use at most {format_go_duration(high)}")
            return False
        return True

    def _wrong_type(self, key: str, wanted: str, value: object, remedy: str) -> None:
        got = go_type(value)
        heading = f"'{key}' expected type '{wanted}', got unconvertible type '{got}'"
        self.fault(key, f"expected {wanted}, got {got}", remedy, heading=heading)
