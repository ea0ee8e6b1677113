"""What commands print: Consul's tables and tab-indented JSON, and the time that is left of a certificate."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from caserver.cli.flags import Flag, UsageError
from caserver.client import ClientError

_UNITS = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def say(text: str) -> None:
    """Print to standard output, ending the line."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def complain(text: str) -> None:
    """Print to standard error, ending the line."""
    sys.stderr.write(text if text.endswith("\n") else text + "\n")


def failed(what: str, exc: ClientError) -> int:
    """Report a call that did not succeed in Consul's words, then what to try; the exit code."""
    complain(f"{what}: {exc}")
    if exc.remedy:
        complain(exc.remedy[0].upper() + exc.remedy[1:])
    return 1


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart, nothing behind the last one: Consul's layout."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def tabbed(document: Any) -> str:
    """JSON as Consul's commands print it: keys of maps sorted by the server, one tab a level."""
    return json.dumps(document, indent="\t", ensure_ascii=False) + "\n"


def format_flag(*formats: str) -> Flag:
    """The ``-format`` flag of a command that has ``formats``; the first one is the default."""
    return Flag(
        "format", f"Output format: {', '.join(formats)}. The default is {formats[0]}.", placeholder="|".join(formats)
    )


def chosen_format(given: str | None, *formats: str) -> str:
    """The format asked for, the first one if none was; UsageError for another."""
    if given is None:
        return formats[0]
    if given not in formats:
        raise UsageError(f'invalid value "{given}" for -format: use {" or ".join(formats)}')
    return given


def server_now(headers: Message) -> datetime | None:
    """The server's clock as its answer tells it, so that a wrong clock here does not mislead."""
    try:
        return parsedate_to_datetime(headers["Date"]).astimezone(UTC)
    except (TypeError, ValueError):
        return None


def left(not_after: str, now: datetime | None) -> str:
    """How long until an RFC 3339 instant, in its two largest units: ``71h 59m``, ``9y 364d``, ``expired``."""
    if now is None:
        return "-"
    try:
        seconds = int((datetime.fromisoformat(not_after) - now).total_seconds())
    except (TypeError, ValueError):
        return "-"
    if seconds <= 0:
        return "expired"
    parts: list[str] = []
    for unit, size in _UNITS:
        count, seconds = divmod(seconds, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
