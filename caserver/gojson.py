"""JSON from the outside, read strictly, its faults told in the words of Go's ``encoding/json``.

Stricter than Go where leniency loses data: one value and nothing behind it, no key twice. As Go it replaces lone
surrogates and reads numbers beyond 64 bits as floats.
"""

from __future__ import annotations

import json
import math
import re

_SPACE = b" \t\r\n"
_LITERALS = {ord("t"): b"true", ord("f"): b"false", ord("n"): b"null"}
_STRING_BODY = re.compile(rb"[^\"\\\x00-\x1f]*")
_ESCAPES = b'bfnrt\\/"'
_INTEGER_DIGITS = 20  # more do not fit 64 bits
_EXACT_FLOAT = 1e21  # Go prints whole floats below this without an exponent
MAX_DEPTH = 100  # containers within containers; nothing that is read here needs ten
_TOO_DEEP = "exceeded max depth"


def decode(text: str) -> object:
    """The value of one JSON document; ValueError says what is wrong (``EOF``, ``unexpected EOF``, ``invalid character ...``)."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_number,
            parse_int=_integer,
            parse_constant=_no_constant,
        )
    except (json.JSONDecodeError, _Constant) as exc:
        raise ValueError(_diagnose(text) or str(exc)) from exc
    except RecursionError as exc:
        raise ValueError(_TOO_DEEP) from exc
    return _clean(value, MAX_DEPTH)


class _Constant(ValueError):
    """NaN and Infinity, which Python reads and JSON does not have."""


def _no_constant(name: str) -> object:
    raise _Constant(name)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'key "{key}" is given twice in one object')
        found[key] = value
    return found


def _integer(digits: str) -> float:
    return int(digits) if len(digits.lstrip("-")) <= _INTEGER_DIGITS else _number(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"json: cannot unmarshal number {digits[:40]} into Go value of type float64")
    return int(value) if value.is_integer() and abs(value) < _EXACT_FLOAT else value


def _clean(value: object, depth: int) -> object:
    """``value`` with lone surrogates replaced, so that it can be written as UTF-8; at most ``depth`` containers deep."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case dict() | list() if not depth:
            raise ValueError(_TOO_DEEP)
        case dict():
            return {_clean(key, 0): _clean(each, depth - 1) for key, each in value.items()}
        case list():
            return [_clean(each, depth - 1) for each in value]
        case _:
            return value


def type_name(value: object) -> str:
    """What Go calls the JSON type of a decoded value."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case dict():
            return "object"
        case _:
            return "array"


class _Invalid(Exception):
    """The character at ``at`` does not belong there."""

    def __init__(self, at: int, context: str) -> None:
        super().__init__(context)
        self.at = at
        self.context = context


def _diagnose(text: str) -> str:
    """Go's message for the first fault of ``text``, or an empty string if Go would find none."""
    data = text.encode("utf-8", "surrogatepass")
    if not data.strip(_SPACE):
        return "EOF"
    try:
        at = _skip(data, _Scan(data).value(0))
    except IndexError:
        return "unexpected EOF"
    except _Invalid as exc:
        return f"invalid character {_quoted(data[exc.at])} {exc.context}"
    return f"invalid character {_quoted(data[at])} after top-level value" if at < len(data) else ""


def _quoted(byte: int) -> str:
    """One byte as Go's scanner quotes it (a byte of a longer UTF-8 sequence shows as the Latin-1 character)."""
    special = {0x27: r"'\''", 0x22: "'\"'", 0x5C: r"'\\'", 0x0A: r"'\n'", 0x0D: r"'\r'", 0x09: r"'\t'"}
    if byte in special:
        return special[byte]
    shown = chr(byte)
    return f"'{shown}'" if shown.isprintable() else f"'\\x{byte:02x}'"


def _skip(data: bytes, at: int) -> int:
    while at < len(data) and data[at] in _SPACE:
        at += 1
    return at


class _Scan:
    """Walks JSON as Go's scanner does; IndexError where the text ends too early, ``_Invalid`` where it is wrong."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def value(self, at: int) -> int:
        """Offset behind the value that begins at or after ``at``; nesting is kept on a list, not on Python's stack."""
        closers: list[int] = []
        while True:
            at = _skip(self._data, at)
            first = self._data[at]
            if first in b"[{":
                at, opened = self._open(at, closers)
                if opened:
                    continue
            else:
                at = self._scalar(at)
            at, done = self._close(at, closers)
            if done:
                return at

    def _open(self, at: int, closers: list[int]) -> tuple[int, bool]:
        """Enter a container: where its first value begins and True, or the offset behind an empty one and False."""
        closer = ord("]") if self._data[at] == ord("[") else ord("}")
        at = _skip(self._data, at + 1)
        if self._data[at] == closer:
            return at + 1, False
        closers.append(closer)
        return (self._key(at), True) if closer == ord("}") else (at, True)

    def _close(self, at: int, closers: list[int]) -> tuple[int, bool]:
        """After a value: where the next one begins and False, or the end of the document and True."""
        while closers:
            at = _skip(self._data, at)
            inside_object = closers[-1] == ord("}")
            if self._data[at] == ord(","):
                at = _skip(self._data, at + 1)
                return (self._key(at) if inside_object else at), False
            if self._data[at] != closers.pop():
                raise _Invalid(at, "after object key:value pair" if inside_object else "after array element")
            at += 1
        return at, True

    def _key(self, at: int) -> int:
        if self._data[at] != ord('"'):
            raise _Invalid(at, "looking for beginning of object key string")
        at = _skip(self._data, self._string(at))
        if self._data[at] != ord(":"):
            raise _Invalid(at, "after object key")
        return at + 1

    def _scalar(self, at: int) -> int:
        first = self._data[at]
        if first == ord('"'):
            return self._string(at)
        if first in _LITERALS:
            return self._literal(at, _LITERALS[first])
        if first in b"-0123456789":
            return self._number(at)
        raise _Invalid(at, "looking for beginning of value")

    def _literal(self, at: int, word: bytes) -> int:
        for offset, wanted in enumerate(word):
            if self._data[at + offset] != wanted:
                raise _Invalid(at + offset, f"in literal {word.decode()} (expecting '{chr(wanted)}')")
        return at + len(word)

    def _string(self, at: int) -> int:
        at += 1
        while True:
            body = _STRING_BODY.match(self._data, at)
            at = body.end() if body else at
            found = self._data[at]
            if found == ord('"'):
                return at + 1
            if found != ord("\\"):
                raise _Invalid(at, "in string literal")
            at = self._escape(at + 1)

    def _escape(self, at: int) -> int:
        if self._data[at] in _ESCAPES:
            return at + 1
        if self._data[at] != ord("u"):
            raise _Invalid(at, "in string escape code")
        for offset in range(1, 5):
            if self._data[at + offset] not in b"0123456789abcdefABCDEF":
                raise _Invalid(at + offset, "in \\u hexadecimal character escape")
        return at + 5

    def _number(self, at: int) -> int:
        if self._data[at] == ord("-"):
            at += 1
            self._digit(at, "in numeric literal")
        at = at + 1 if self._data[at] == ord("0") else self._digits(at)
        if self._data[at : at + 1] == b".":
            self._digit(at + 1, "after decimal point in numeric literal")
            at = self._digits(at + 1)
        if self._data[at : at + 1] in (b"e", b"E"):
            at += 2 if self._data[at + 1] in b"+-" else 1
            self._digit(at, "in exponent of numeric literal")
            at = self._digits(at)
        return at

    def _digit(self, at: int, context: str) -> None:
        if self._data[at] not in b"0123456789":
            raise _Invalid(at, context)

    def _digits(self, at: int) -> int:
        while self._data[at : at + 1].isdigit():
            at += 1
        return at
