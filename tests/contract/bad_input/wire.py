"""Bytes that are no HTTP, or HTTP that two servers in a row would read differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.contract.bad_input.case import CONFIGURATION, SIGN, Case

_END = b"\r\n\r\n"


def cases() -> Iterator[Case]:
    """All of them."""
    for name, line in request_lines().items():
        yield Case(f"wire-line-{name}", raw=line + b"\r\nHost: localhost\r\nConnection: close" + _END, bare=True)
    for name, lines in header_lines().items():
        head = f"PUT {CONFIGURATION} HTTP/1.1\r\nConnection: close\r\n".encode()
        yield Case(f"wire-header-{name}", raw=head + lines + _END, bare=True)
    for name, (lines, body) in framings().items():
        head = f"PUT {SIGN} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode()
        yield Case(f"wire-body-{name}", raw=head + lines + _END + body, bare=True)


def request_lines() -> Mapping[str, bytes]:
    """First lines."""
    path = CONFIGURATION.encode()
    return {
        "no-version": b"GET " + path,
        "version-text": b"GET " + path + b" HTTP/x",
        "version-3": b"GET " + path + b" HTTP/3.0",
        "version-9": b"GET " + path + b" HTTP/9.9",
        "version-lower": b"GET " + path + b" http/1.1",
        "no-path": b"GET HTTP/1.1",
        "empty": b"",
        "space-in-path": b"GET /v1/a b HTTP/1.1",
        "nul-in-path": b"GET /v1/a\0b HTTP/1.1",
        "method-lower": b"put " + path + b" HTTP/1.1",
        "method-bytes": b"P\xffT " + path + b" HTTP/1.1",
        "method-brackets": b"<GET> " + path + b" HTTP/1.1",
        "tls-hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "http2": b"PRI * HTTP/2.0",
        "control": b"GET /v1/\x01 HTTP/1.1",
        "smtp": b"EHLO localhost",
        "long": b"GET /" + b"a" * 20_000 + b" HTTP/1.1",
    }


def header_lines() -> Mapping[str, bytes]:
    """Header fields; the request has no body but for what they say."""
    host = b"Host: localhost\r\n"
    return {
        "no-colon": host + b"Evil",
        "no-name": host + b": x",
        "space-before-colon": host + b"X-Evil : x",
        "space-in-name": host + b"X Evil: x",
        "nul-in-value": host + b"X-Evil: a\0b",
        "nul-in-name": host + b"X-\0Evil: a",
        "control-in-name": host + b"X-\x01: a",
        "non-ascii-name": host + b"X-\xc3\xa9: a",
        "folded": host + b"X-Evil: a\r\n b",
        "bare-return": host + b"X-Evil: a\rX-Other: b",
        "too-long": host + b"X-Evil: " + b"a" * 20_000,
        "too-many": host + b"".join(b"X-%d: a\r\n" % at for at in range(500))[:-2],
        "length-negative": host + b"Content-Length: -1",
        "length-plus": host + b"Content-Length: +5",
        "length-text": host + b"Content-Length: five",
        "length-hex": host + b"Content-Length: 0x5",
        "length-underscore": host + b"Content-Length: 1_0",
        "length-fraction": host + b"Content-Length: 5.0",
        "length-list": host + b"Content-Length: 5, 5",
        "length-huge": host + b"Content-Length: 99999999999999999999",
        "length-over-the-limit": host + b"Content-Length: 70000",
        "length-twice": host + b"Content-Length: 5\r\nContent-Length: 6",
        "length-and-chunked": host + b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        "chunked-twice": host + b"Transfer-Encoding: chunked, chunked",
        "chunked-not-last": host + b"Transfer-Encoding: chunked, identity",
        "encoding-unknown": host + b"Transfer-Encoding: xchunked",
        "encoding-tab": host + b"Transfer-Encoding:\x0bchunked",
    }


def framings() -> Mapping[str, tuple[bytes, bytes]]:
    """Chunks."""
    chunked = b"Transfer-Encoding: chunked"
    return {
        "size-text": (chunked, b"zz\r\nhello\r\n0\r\n\r\n"),
        "size-negative": (chunked, b"-5\r\nhello\r\n0\r\n\r\n"),
        "size-plus": (chunked, b"+5\r\nhello\r\n0\r\n\r\n"),
        "size-prefix": (chunked, b"0x5\r\nhello\r\n0\r\n\r\n"),
        "size-huge": (chunked, b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        "size-empty": (chunked, b"\r\nhello\r\n0\r\n\r\n"),
        "size-too-small": (chunked, b"2\r\nhello\r\n0\r\n\r\n"),
        "size-with-space": (chunked, b"5 5\r\nhello\r\n0\r\n\r\n"),
        "extension-long": (chunked, b"5;" + b"a" * 40_000 + b"\r\nhello\r\n0\r\n\r\n"),
        "over-the-limit": (chunked, (b"8000\r\n" + b"a" * 0x8000 + b"\r\n") * 20 + b"0\r\n\r\n"),
        "expect-unknown": (b"Expect: 200-maybe\r\nContent-Length: 1", b"x"),
    }
