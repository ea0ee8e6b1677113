"""Log lines: Consul's layout for people, one JSON object a line for machines, and no secret in either.

A logger is got with ``structlog.get_logger("connect")`` (the name is what Consul prints before the message); data are
keywords. Records of libraries that use ``logging`` pass through the same steps. The last of these is a guard that works
by value, not by key: a ``Secret``, a PEM private key and every text registered as a secret are replaced wherever
they turn up, in tracebacks too.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from caserver.environment import Clock
from caserver.fields import REDACTED, Secret

LEVELS: Mapping[str, int] = {
    "trace": 5,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_LABELS = {"warning": "WARN", "critical": "ERROR", "exception": "ERROR"}
_COLOURS = {"DEBUG": "\x1b[2m", "WARN": "\x1b[33m", "ERROR": "\x1b[31m"}
_RESET = "\x1b[0m"
_LABEL_WIDTH = 7  # of "[ERROR]"
# A key cut off before its END line is a key all the same.
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_SECRET_MIN = 8  # characters; a shorter "secret" would black out ordinary words
_PLAIN = re.compile(r"[^\s\"=]+")


def configure(
    *,
    level: str,
    as_json: bool,
    node: str,
    clock: Clock,
    secrets: Iterable[Secret] = (),
    stream: TextIO | None = None,
) -> None:
    """Set up structlog and ``logging`` for this process, once, before the first line.

    ``level`` is a key of ``LEVELS``; ``secrets`` are texts that no line may hold; ``stream`` defaults to stderr.
    """
    target = stream or sys.stderr
    hidden = tuple(each.reveal() for each in secrets if len(each.reveal()) >= _SECRET_MIN)
    render = _json_line if as_json else _text_line(colours=target.isatty())

    def stamp(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["timestamp"] = clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event["@node"] = node
        return event

    def guard(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {key: _guarded(value, hidden) for key, value in event.items()}

    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_level,
        _add_traceback,
        stamp,
        guard,
        render,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(max(LEVELS[level], logging.DEBUG)),
        logger_factory=_Factory(target),
        cache_logger_on_first_use=False,  # a test, or a reload, may configure again
    )
    _bridge_logging(LEVELS[level])


class _Factory:
    """Makes the writer behind each logger; the name given to ``get_logger`` becomes part of every event."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def __call__(self, *names: Any) -> _Writer:
        return _Writer(self._target, str(names[0]) if names else "agent")


class _Writer:
    """Writes finished lines; every level has a method, as structlog wants it."""

    def __init__(self, target: TextIO, name: str) -> None:
        self._target = target
        self.name = name

    def msg(self, line: str) -> None:
        """Write one line whole: a single ``write`` keeps lines of two threads apart."""
        self._target.write(line + "\n")
        self._target.flush()

    debug = info = warning = warn = error = critical = exception = fatal = log = msg


def _add_level(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["level"] = _LABELS.get(method, method.upper())
    event.setdefault("logger", getattr(logger, "name", "agent"))
    return event


def _add_traceback(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()[1]
    elif isinstance(found, tuple):
        found = found[1]
    if isinstance(found, BaseException):
        event["traceback"] = "".join(traceback.format_exception(found))
    return event


def _guarded(value: Any, hidden: tuple[str, ...]) -> Any:
    match value:
        case Secret():
            return REDACTED
        case bool() | int() | float() | None:
            return value
        case Mapping():
            return {_guarded_text(str(key), hidden): _guarded(each, hidden) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_guarded(each, hidden) for each in value]
        case bytes() | bytearray():
            return _guarded_text(value.decode("utf-8", "backslashreplace"), hidden)
        case _:
            return _guarded_text(str(value), hidden)


def _guarded_text(text: str, hidden: tuple[str, ...]) -> str:
    for secret in hidden:
        text = text.replace(secret, REDACTED)
    return _PRIVATE_KEY.sub(REDACTED, text) if "PRIVATE KEY-----" in text else text


def _json_line(_: WrappedLogger, __: str, event: EventDict) -> str:
    """The names of Consul's log_json, data beside them."""
    named = {
        "@level": event.pop("level").lower(),
        "@message": event.pop("event"),
        "@module": event.pop("logger"),
        "@timestamp": event.pop("timestamp"),
        "@node": event.pop("@node"),
    }
    return json.dumps({**named, **event}, ensure_ascii=False, default=str)


def _text_line(*, colours: bool) -> Processor:
    def render(_: WrappedLogger, __: str, event: EventDict) -> str:
        label, message = event.pop("level"), event.pop("event")
        stamp, logger, trace = event.pop("timestamp"), event.pop("logger"), event.pop("traceback", "")
        event.pop("@node")  # a terminal shows one node; only JSON is collected from many
        data = " ".join(f"{key}={_shown(value)}" for key, value in event.items())
        tag = f"[{label}]".ljust(_LABEL_WIDTH)
        if colours and label in _COLOURS:
            tag = f"{_COLOURS[label]}{tag}{_RESET}"
        line = f"{stamp} {tag} {logger}: {_one_line(message)}" + (f": {data}" if data else "")
        return f"{line}\n{trace.rstrip()}" if trace else line

    return render


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    # A line break in a message (of a client's making, perhaps) must not look like a line of its own.
    return text.replace("\r", "\\r").replace("\n", "\\n")


class _Bridge(logging.Handler):
    """Hands records of ``logging`` to structlog, under the name of their logger."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        logger = structlog.get_logger(record.name)
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)  # structlog knows the named ones
        logger.log(level, record.getMessage(), exc_info=record.exc_info)


def _bridge_logging(level: int) -> None:
    root = logging.getLogger()
    root.handlers = [_Bridge()]
    root.setLevel(level)
    # Libraries report their inner workings at INFO; that is our DEBUG.
    for name in ("aiohttp", "asyncio", "pysyncobj"):
        logging.getLogger(name).setLevel(logging.DEBUG if level <= logging.DEBUG else logging.WARNING)
