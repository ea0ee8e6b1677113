"""TLS of the HTTPS listener as the configuration names it; the files are read by ``pki.tls``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caserver.config.reading import Reading
from caserver.errors import InvalidConfig
from caserver.fields import Fields

# Consul's spellings -> whether it is offered.
_TLS_VERSIONS = {"tls10": False, "tls11": False, "tls12": True, "tls13": True}
_TLS_MIN = "tls12"


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files of the public HTTPS listener."""

    cert_file: Path
    key_file: Path
    ca_file: Path | None  # accepts client certificates of these CAs
    verify_incoming: bool  # a client certificate is required
    min_version: str = _TLS_MIN  # or tls13


JudgeTLS = Callable[[TLSFiles], object]


def read_tls(reading: Reading, top: Fields, judge_tls: JudgeTLS | None) -> TLSFiles | None:
    """The files, checked by ``judge_tls`` if all are there; None without a certificate, so without HTTPS."""
    files = {key: _file(top, key) for key in ("cert_file", "key_file", "ca_file")}
    verify = top.flag("verify_incoming")
    cert, key, ca = files.values()
    if (cert is None) != (key is None):
        missing = "key_file" if key is None else "cert_file"
        top.fault(missing, "missing", "HTTPS needs cert_file and key_file")
    if verify and (cert is None or ca is None):
        top.fault("verify_incoming", "needs cert_file, key_file and ca_file", "set them, or leave it out")
    min_version = _tls_min_version(top)
    if cert is None or key is None:
        return None
    found = TLSFiles(cert, key, ca, verify, min_version)
    if judge_tls is not None and all(path is None or path.is_file() for path in files.values()):
        try:
            judge_tls(found)
        except InvalidConfig as exc:
            reading.judged(exc)
    return found


def _tls_min_version(top: Fields) -> str:
    text = top.text("tls_min_version") or _TLS_MIN
    if text not in _TLS_VERSIONS:
        top.fault("tls_min_version", f'"{text}" is no version of TLS', "use tls12 or tls13")
    elif not _TLS_VERSIONS[text]:
        top.fault("tls_min_version", f"{text} is not offered: it is broken", "use tls12 or tls13")
    return text if _TLS_VERSIONS.get(text) else _TLS_MIN


def _file(top: Fields, key: str) -> Path | None:
    text = top.text(key)
    if not text:
        return None
    if not Path(text).is_file():
        top.fault(key, f"{text} is not a file", "check the path and its permissions")
    return Path(text)
