"""One reading of the merged settings: its faults, its warnings, and Consul's keys that mean nothing here.

The modules of the sections (``servers``, ``listeners``, ...) take their keys out of it; a value with a fault counts as
its default, so that reading goes on and every fault is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caserver.config.consul_keys import IGNORED, JOIN_KEYS, REFUSED
from caserver.config.sources import Settings
from caserver.errors import InvalidConfig
from caserver.fields import Fault, Fields


@dataclass(slots=True)
class Reading:
    """What the sections share while they are read."""

    settings: Settings
    dev: bool
    hostname: str
    faults: list[Fault] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # dotted keys

    @property
    def warnings(self) -> list[str]:
        """What is likely a mistake, but none that keeps a node from starting."""
        return self.settings.warnings

    @property
    def incomplete(self) -> bool:
        """Whether a file could not be read whole, so that a key may only seem to be missing."""
        return self.settings.incomplete

    def top(self) -> Fields:
        """The keys outside every table."""
        given = self.settings.values
        self.faults.extend(
            Fault(key, "is not read here", remedy) for key, remedy in REFUSED.items() if given.get(key) is not None
        )
        return self._fields("", given, skipped={*JOIN_KEYS, *REFUSED})

    def section(self, name: str, given: Mapping[str, object]) -> Fields:
        """The keys of one table by its dotted name; ``done`` has to follow."""
        return self._fields(name, given, skipped=set())

    def done(self, fields: Fields) -> None:
        """Everything known was asked for: what is left in ``fields`` is unknown."""
        fields.finish()
        self.faults.extend(fields.faults)

    def judged(self, exc: InvalidConfig) -> None:
        """Take over the faults of a judge who names the key in front of each line."""
        for line in exc.detail.splitlines():
            name, _, problem = line.partition(": ")
            self.faults.append(Fault(name, problem))

    def _fields(self, name: str, given: Mapping[str, object], *, skipped: set[str]) -> Fields:
        ignored = IGNORED.get(name, frozenset()).intersection(given)
        self.ignored.extend(f"{name}.{key}" if name else key for key in ignored)
        kept = {key: each for key, each in given.items() if key not in ignored and key not in skipped}
        return Fields(kept, where=name, exact=True)
