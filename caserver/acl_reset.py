"""The file by which an operator who lost every management token proves to own the machine of the leader."""

from __future__ import annotations

import re
from pathlib import Path

import structlog

NAME = "acl-bootstrap-reset"  # in the data directory; Consul's
_BYTES_MAX = 64

_log = structlog.get_logger("caserver.acl")


class ResetFile:
    """``data_dir/acl-bootstrap-reset``; a node without a data directory has none."""

    def __init__(self, data_dir: Path | None) -> None:
        self._path = None if data_dir is None else data_dir / NAME

    def read(self) -> int:
        """The index in the file; 0 if there is no file or no number in it, which is logged."""
        if self._path is None:
            return 0
        try:
            with self._path.open("rb") as file:
                raw = file.read(_BYTES_MAX)
        except FileNotFoundError:
            return 0
        except OSError as exc:
            _log.error("the bootstrap reset file cannot be read", path=str(self._path), reason=exc.strerror)
            return 0
        number = re.match(rb"\s*([0-9]{1,18})\b", raw)
        if number is None:
            _log.error("the bootstrap reset file does not begin with an index", path=str(self._path))
            return 0
        return int(number[1])

    def remove(self) -> None:
        """Take the file away; what keeps it is logged."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as exc:
            _log.warning("the bootstrap reset file cannot be removed", path=str(self._path), reason=exc.strerror)
