from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import structlog

from caserver.fields import Secret
from caserver.telemetry import logs

KEY = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIhunter2\n-----END EC PRIVATE KEY-----\n"


class StoppedClock:
    def now(self) -> datetime:
        return datetime(2026, 11, 23, 11, 26, 4, 492000, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield
    structlog.reset_defaults()
    root.handlers, root.level = before


def configured(
    *, level: str = "info", as_json: bool = False, secrets: tuple[Secret, ...] = (), terminal: bool = False
) -> io.StringIO:
    stream = Terminal() if terminal else io.StringIO()
    logs.configure(level=level, as_json=as_json, node="n1", clock=StoppedClock(), secrets=secrets, stream=stream)
    return stream


def test_a_line_has_consuls_layout() -> None:
    stream = configured()

    structlog.get_logger("connect").info('CA rotated to new root under provider "consul"')
    structlog.get_logger("agent").warning("slow", seconds=1.5, why="two words", peer="n2", roots=("a", "b c"))

    assert stream.getvalue().splitlines() == [
        '2026-11-23T11:26:04.492Z [INFO]  connect: CA rotated to new root under provider "consul"',
        '2026-11-23T11:26:04.492Z [WARN]  agent: slow: seconds=1.5 why="two words" peer=n2 roots=[a, "b c"]',
    ]


def test_json_lines_have_consuls_names_and_the_node() -> None:
    stream = configured(as_json=True)

    structlog.get_logger("connect").bind(term=7).error("lost", node="n2")

    assert json.loads(stream.getvalue()) == {
        "@level": "error",
        "@message": "lost",
        "@module": "connect",
        "@timestamp": "2026-11-23T11:26:04.492Z",
        "@node": "n1",
        "term": 7,
        "node": "n2",
    }


def test_only_a_terminal_gets_colours() -> None:
    plain, coloured = configured(), None
    structlog.get_logger("a").error("x")
    coloured = configured(terminal=True)
    structlog.get_logger("a").error("x")

    assert "\x1b" not in plain.getvalue()
    assert "\x1b[31m[ERROR]\x1b[0m" in coloured.getvalue()


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("trace", ["DEBUG", "INFO", "WARN", "ERROR"]),
        ("debug", ["DEBUG", "INFO", "WARN", "ERROR"]),
        ("info", ["INFO", "WARN", "ERROR"]),
        ("warn", ["WARN", "ERROR"]),
        ("error", ["ERROR"]),
    ],
)
def test_a_level_lets_itself_and_what_is_worse_pass(level: str, expected: list[str]) -> None:
    stream = configured(level=level)
    logger = structlog.get_logger("a")

    logger.debug("x")
    logger.info("x")
    logger.warning("x")
    logger.error("x")

    assert [line.split("[")[1].split("]")[0] for line in stream.getvalue().splitlines()] == expected


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        Secret("hunter2"),
        {"inner": [Secret("hunter2"), {"hunter2 here": 1}]},
        KEY,
        KEY.encode(),
        KEY[:50],
        repr(KEY),
        json.dumps({"k": KEY}),
        ("x", KEY),
        "the secret is cluster-hunter2",
        ValueError(KEY),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_secret_gets_into_a_line(value: object, as_json: bool) -> None:
    stream = configured(as_json=as_json, secrets=(Secret("cluster-hunter2"), Secret("hunter2 here")))

    structlog.get_logger("a").error("event", data=value)
    structlog.get_logger("a").error(f"event {value}")

    assert "hunter2" not in stream.getvalue()
    assert "<redacted>" in stream.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_no_secret_gets_into_a_traceback(as_json: bool) -> None:
    stream = configured(as_json=as_json)

    def fail() -> None:
        raise ValueError(KEY)

    try:
        fail()
    except ValueError:
        structlog.get_logger("a").exception("failed")
        logging.getLogger("library").exception("failed too")

    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count("ValueError: <redacted>") == 2


def test_a_short_secret_does_not_black_out_words() -> None:
    stream = configured(secrets=(Secret("a"),))

    structlog.get_logger("a").info("all is well")

    assert "all is well" in stream.getvalue()


def test_a_line_break_in_a_message_makes_no_second_line() -> None:
    stream = configured()

    structlog.get_logger("http").info("path /a\n2026 [ERROR] forged", query="x\ny")

    assert len(stream.getvalue().splitlines()) == 1


def test_records_of_libraries_pass_through_the_same_steps() -> None:
    stream = configured(secrets=(Secret("cluster-hunter2"),))

    logging.getLogger("somewhere").warning("seen %s", "cluster-hunter2")
    logging.getLogger("aiohttp.server").info("inner workings")
    logging.getLogger("odd").log(37, "between the levels")

    assert stream.getvalue().splitlines() == [
        "2026-11-23T11:26:04.492Z [WARN]  somewhere: seen <redacted>",
        "2026-11-23T11:26:04.492Z [WARN]  odd: between the levels",
    ]


def test_bound_context_reaches_every_line() -> None:
    stream = configured()

    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("a").info("x")

    assert stream.getvalue().rstrip().endswith("a: x: request_id=r1")
