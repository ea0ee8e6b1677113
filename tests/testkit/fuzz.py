"""Requests made up from the served OpenAPI document, valid ones and broken ones, and what is wrong with the answers.

An answer must have a status, a content type, headers and a body that the document tells of, and be no 5xx: the node is
well, so that nothing explains one.
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PATIENCE = 30.0  # seconds for one answer
SERVER_ERROR = 500
UNFINISHED = 0.5  # seconds after which a twisted request counts as one that does not end
# What is put in place of bytes of a request.
PIECES = (
    *(bytes((each,)) for each in b"\0\t\n\r \"%&'+,-./0:;<=?A[\\]{}\x7f\x80\xc3\xff"),
    b"",
    b"%00",
    b"%2e%2e%2f",
    b"%ff",
    b"\r\n",
    b"null",
    b"[[[[",
    b'{"a":',
    b"9" * 30,
    b"-1",
    b"1e999",
    b"\xf0\x9f\x98\x80",
    b"A" * 300,
    b"?index=1&wait=1ms",
)
WAIT = "1ms"  # instead of what a blocking query would wait


@dataclass(slots=True)
class Summary:
    """What was answered: (method, path, status) -> how often; and what was wrong, one line each."""

    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    unanswered: int = 0  # twisted requests that were none any more: not counted among the requests

    @property
    def requests(self) -> int:
        return self.answers.total()


def fuzz(
    url: str,
    *,
    examples: int,
    number: int = 0,
    twists: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Send ``examples`` requests to each operation of the node at ``url``; the same ones for the same ``number``.

    Each is sent ``twists`` times more with some of its bytes changed, after which anything but a 5xx may be the answer.
    """
    summary = Summary()
    twister = Twister(url, random.Random(number), summary)
    with requests.Session() as session:
        document = session.get(f"{url}/openapi.json", timeout=PATIENCE).json()
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            operation: Any = found.ok()  # type: ignore[union-attr]  # a document that is none fails here
            progress(f"{operation.method.upper()} {operation.path}")
            _fuzz_operation(operation, url, session, summary, twister, examples=examples, number=number, twists=twists)
    return summary


class Twister:
    """Sends requests with bytes changed, each on a connection of its own."""

    def __init__(self, url: str, chance: random.Random, summary: Summary) -> None:
        self._url, self._chance, self._summary = urlsplit(url), chance, summary

    def send(self, request: requests.PreparedRequest, path: str) -> None:
        """One request with one to four changes, counted under ``path``."""
        data = bytearray(_bytes_of(request))
        for _ in range(self._chance.randint(1, 4)):
            at = self._chance.randrange(len(data))
            piece = self._chance.choice(PIECES)
            data[at : at + self._chance.choice((0, 1, 1, 4))] = piece
        head, separator, body = bytes(data).partition(b"\r\n\r\n")
        try:
            status = self._exchanged(head + separator + body)
        except OSError:  # closed without an answer, as what is no request may be
            self._summary.unanswered += 1
            return
        self._summary.answers["twisted", path, status] += 1
        if status >= SERVER_ERROR:
            self._summary.faults.append(f"{bytes(data)!r}: {status}")

    def _exchanged(self, data: bytes) -> int:
        """The status of the answer; TimeoutError for none, as a request gets that does not end."""
        with socket.create_connection(
            (str(self._url.hostname), self._url.port or 80), timeout=UNFINISHED
        ) as connection:
            connection.sendall(data)
            head = b""
            while b"\r\n" not in head:
                more = connection.recv(65536)
                if not more:
                    raise ConnectionError("closed")
                head += more
        return int(head[9:12])


def _bytes_of(request: requests.PreparedRequest) -> bytes:
    """The request as it went over the wire."""
    body: Any = request.body or b""
    body = body.encode() if isinstance(body, str) else bytes(body)
    lines = [f"{request.method} {request.path_url} HTTP/1.1", "Host: localhost"]
    headers: Mapping[str, Any] = request.headers
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + bytes(body)


def _fuzz_operation(
    operation: Any,
    url: str,
    session: requests.Session,
    summary: Summary,
    twister: Twister,
    *,
    examples: int,
    number: int,
    twists: int,
) -> None:
    cases = st.one_of(
        operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
        operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
    )

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def send(case: Any) -> None:
        if case.query and "index" in case.query:
            case.query["wait"] = WAIT
        response = case.call(base_url=url, session=session, timeout=PATIENCE)
        summary.answers[case.method, operation.path, response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except (Failure, FailureGroup) as exc:
            faults = exc.exceptions if isinstance(exc, FailureGroup) else (exc,)
            summary.faults += [f"{case.as_curl_command()}: {response.status_code} {each}" for each in faults]
        for _ in range(twists):
            twister.send(response.request, operation.path)

    send()


def told(summary: Summary) -> str:
    """The summary as a table, JSON lines of it sorted by operation."""
    lines = [
        f"{count:8}  {status}  {method} {path}" for (method, path, status), count in sorted(summary.answers.items())
    ]
    return "\n".join([*lines, f"{summary.requests:8}  requests, {len(summary.faults)} faults"])
