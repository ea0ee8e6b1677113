"""How values become JSON and come back checked: the building blocks of the formats of commands and states.

What one node packs, every node must be able to unpack, so both ways check. Formats are explicit: members by name, or rows
in a fixed order for what there is much of; ``ValueError`` for what does not fit.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from immutables import Map

from caserver.internode.keyring import Sealed

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shape(Generic[T]):
    """How one kind of value is packed into JSON and unpacked again (ValueError if it does not fit)."""

    pack: Callable[[T], Any]
    unpack: Callable[[Any], T]


def exactly(kind: type[T]) -> Shape[T]:
    """A value of exactly this type (a bool is no int)."""

    def checked(value: Any) -> T:
        if type(value) is not kind:  # both ways: what this node packs, every node must be able to unpack
            raise ValueError(f"{kind.__name__} expected, {type(value).__name__} found")
        return value

    return Shape(checked, checked)


def _checked_number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"number expected, {type(value).__name__} found")
    return float(value)


def _unpack_bytes(value: Any) -> bytes:
    return base64.b64decode(TEXT.unpack(value), validate=True)


def _pack_serial(value: int) -> str:
    return format(value, "x")  # hex knows no limit of digits


def _unpack_serial(value: Any) -> int:
    return int(TEXT.unpack(value), 16)


def optional(shape: Shape[T]) -> Shape[T | None]:
    """The same, or null."""
    return Shape(
        lambda value: None if value is None else shape.pack(value),
        lambda value: None if value is None else shape.unpack(value),
    )


def many(shape: Shape[T]) -> Shape[tuple[T, ...]]:
    """A list of the same."""

    def unpack(value: Any) -> tuple[T, ...]:
        if type(value) is not list:
            raise ValueError("list expected")
        return tuple(shape.unpack(each) for each in value)

    return Shape(lambda value: [shape.pack(each) for each in value], unpack)


def tuple_of(*shapes: Shape[Any]) -> Shape[Any]:
    """A list with one value of each shape, in order."""

    def unpack(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(shapes):
            raise ValueError(f"list of {len(shapes)} expected")
        return tuple(shape.unpack(each) for shape, each in zip(shapes, value, strict=True))

    return Shape(lambda value: [shape.pack(each) for shape, each in zip(shapes, value, strict=True)], unpack)


def record(kind: Callable[..., T], later: frozenset[str] = frozenset(), /, **fields: Shape[Any]) -> Shape[T]:
    """An object with exactly these members, which are the attributes of ``kind``.

    Those of ``later`` came after others were written: where one is missing it has the value that ``kind`` gives it.
    """

    def unpack(value: Any) -> T:
        if type(value) is not dict or not value.keys() <= fields.keys() <= value.keys() | later:
            raise ValueError(f"object with {', '.join(fields)} expected")
        return kind(**{name: fields[name].unpack(found) for name, found in value.items()})

    return Shape(lambda value: {name: shape.pack(getattr(value, name)) for name, shape in fields.items()}, unpack)


def row_of(kind: Callable[..., T], /, **fields: Shape[Any]) -> Shape[T]:
    """The same without names, for what there is much of: a list in this order."""
    values = tuple_of(*fields.values())
    return Shape(
        lambda value: values.pack([getattr(value, name) for name in fields]),
        lambda value: kind(*values.unpack(value)),
    )


def sorted_map(key: Shape[Any], value: Shape[R]) -> Shape[Map[Any, R]]:
    """A mapping as a list of pairs, sorted by key: equal mappings have equal bytes."""

    def unpack(found: Any) -> Map[Any, R]:
        pairs = many(tuple_of(key, value)).unpack(found)
        return Map(pairs)

    return Shape(lambda found: [[key.pack(each), value.pack(found[each])] for each in sorted(found)], unpack)


TEXT = exactly(str)
INT = exactly(int)
FLAG = exactly(bool)
NUMBER: Shape[float] = Shape(_checked_number, _checked_number)
BYTES: Shape[bytes] = Shape(lambda value: base64.b64encode(value).decode(), _unpack_bytes)
SEALED: Shape[Sealed] = Shape(BYTES.pack, lambda value: Sealed(BYTES.unpack(value)))
SERIAL: Shape[int] = Shape(_pack_serial, _unpack_serial)
