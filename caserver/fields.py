"""Secrets that cannot be shown by accident, and the faults of an untrusted mapping, collected instead of thrown."""

from __future__ import annotations

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
    """One thing wrong with an input: where, what was given (never of a secret) and what to do."""

    field: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")
