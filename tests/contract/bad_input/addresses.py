"""Paths, service names, queries, headers and methods that are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import quote

from tests.contract.bad_input.case import CONFIGURATION, LEAF, SIGN, Case

ROOTS = "/v1/connect/ca/roots"


def cases() -> Iterator[Case]:
    """All of them."""
    for name, path in leaf_names().items():
        yield Case(f"leaf-{name}", path=LEAF + path)
    for name, path in unknown_paths().items():
        yield Case(f"path-{name}", path=path, bare=True)
    for name, query in queries().items():
        for path in (ROOTS, LEAF + "web"):
            yield Case(f"query-{name}-{path.rpartition('/')[2]}", path=f"{path}?{query}")
    for name, headers in header_sets().items():
        yield Case(f"header-{name}", path=f"{LEAF}web", headers=headers)
    for path in (ROOTS, CONFIGURATION, SIGN, LEAF + "web", "/v1/status/leader", "/openapi.json"):
        for method in ("DELETE", "PATCH", "TRACE", "HEAD", "PROPFIND"):
            yield Case(f"method-{method}-{path}", method=method, path=path, bare=method == "HEAD")
    yield Case("method-foreign-page", "PUT", CONFIGURATION, b"{}", {"Origin": "https://evil.example"})
    yield Case("method-foreign-site", "PUT", SIGN, b"x", {"Sec-Fetch-Site": "cross-site"})
    yield Case("host-unknown", path=ROOTS, headers={"Host": "evil.example", "Origin": "http://evil.example"})


def leaf_names() -> Mapping[str, str]:
    """What cannot be a service."""
    return {
        "none": "",
        "slash-inside": "a/b",
        "slash-behind": "web/",
        "encoded-slash": "a%2Fb",
        "encoded-slash-lower": "a%2fb",
        "encoded-newline": "web%0a",
        "encoded-return": "web%0d%0aX-Evil:%201",
        "encoded-tab": "web%09",
        "encoded-escape": "web%1b[31m",
        "encoded-delete": "web%7f",
        "encoded-c1": "web%c2%85",
        "not-utf8": "web%ff",
        "not-utf8-alone": "%ff%fe",
        "overlong": "web%c0%af",
        "surrogate": "web%ed%a0%80",
        "cut-utf8": "web%c3",
        "too-long": "w" * 1025,
        "far-too-long": "w" * 7000,
        "too-long-encoded": quote("é" * 200),
        "other-namespace": "web?ns=other",
        "namespace-and-partition": "web?ns=x&partition=y",
    }


def unknown_paths() -> Mapping[str, str]:
    """What leads nowhere."""
    return {
        "unknown": "/v1/nope",
        "upper-case": ROOTS.upper(),
        "trailing-slash": ROOTS + "/",
        "nul": "/v1/connect/ca/roots%00",
        "nul-in-leaf": LEAF + "a%00b",
        "old-version": "/v0/connect/ca/roots",
        "file": "/etc/passwd",
        "backslash": "/v1\\connect\\ca\\roots",
        "semicolon": ROOTS + ";a=b",
        "not-utf8": "/v1/%ff",
        "debug": "/debug/pprof/",
        "long": "/" + "a" * 7000,
        "double-encoded": "/v1/connect/ca/%2572oots",
    }


def queries() -> Mapping[str, str]:
    """Options that cannot be read."""
    return {
        "index-text": "index=abc",
        "index-negative": "index=-1",
        "index-fraction": "index=1.5",
        "index-too-large": "index=99999999999999999999",
        "index-2-64": f"index={2**64}",
        "index-long": "index=" + "1" * 5000,
        "index-hex": "index=0x10",
        "index-space": "index=%201",
        "index-plus": "index=%2B1",
        "index-underscore": "index=1_000",
        "index-other-digits": "index=%D9%A1",
        "wait-text": "index=1&wait=xyz",
        "wait-no-unit": "wait=10",
        "wait-space": "wait=1%20s",
        "wait-other-digits": "wait=%D9%A1s",
        "wait-exponent": "wait=1e3s",
        "wait-overflow": "wait=99999999999999h",
        "wait-nul": "wait=1s%00",
        "stale-and-consistent": "stale&consistent",
        "stale-and-consistent-false": "stale=false&consistent=false",
        "max-stale-text": "stale&max_stale=bad",
        "other-datacenter": "dc=nope",
        "datacenter-case": "dc=DC1",
        "datacenter-nul": "dc=dc1%00",
    }


def header_sets() -> Mapping[str, Mapping[str, str]]:
    """Headers that cannot be obeyed."""
    return {
        "cache-control-text": {"Cache-Control": "max-age=x"},
        "cache-control-fraction": {"Cache-Control": "max-age=1.5"},
        "cache-control-empty": {"Cache-Control": "max-age="},
        "stale-if-error-text": {"Cache-Control": "stale-if-error=x"},
        "cache-control-second": {"Cache-Control": "no-cache, max-age=1s"},
        "namespace": {"X-Consul-Namespace": "other"},
    }
