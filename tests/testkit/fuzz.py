"""Requests made up from the served OpenAPI document, valid ones and broken ones, and what is wrong with the answers.

An answer must have a status, a content type, headers and a body that the document tells of, and be no 5xx: the node is
well, so that nothing explains one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
WAIT = "1ms"  # instead of what a blocking query would wait


@dataclass(slots=True)
class Summary:
    """What was answered: (method, path, status) -> how often; and what was wrong, one line each."""

    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.answers.total()


def fuzz(url: str, *, examples: int, number: int = 0, progress: Callable[[str], None] = lambda _: None) -> Summary:
    """Send ``examples`` requests to each operation of the node at ``url``; the same ones for the same ``number``."""
    summary = Summary()
    with requests.Session() as session:
        document = session.get(f"{url}/openapi.json", timeout=PATIENCE).json()
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            operation: Any = found.ok()  # type: ignore[union-attr]  # a document that is none fails here
            progress(f"{operation.method.upper()} {operation.path}")
            _fuzz_operation(operation, url, session, summary, examples=examples, number=number)
    return summary


def _fuzz_operation(
    operation: Any, url: str, session: requests.Session, summary: Summary, *, examples: int, number: int
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

    send()


def told(summary: Summary) -> str:
    """The summary as a table, JSON lines of it sorted by operation."""
    lines = [
        f"{count:8}  {status}  {method} {path}" for (method, path, status), count in sorted(summary.answers.items())
    ]
    return "\n".join([*lines, f"{summary.requests:8}  requests, {len(summary.faults)} faults"])
