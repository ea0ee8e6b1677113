"""``python -m tests.testkit.bad_disk FILE agent ...``: an agent whose disk syncs as FILE says, read at every sync.

No file: as the machine's disk does. A number: that many seconds later. Anything else: an input/output error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def troubled(sync: Callable[[Any], None], orders: Path) -> Callable[[Any], None]:
    def call(descriptor: Any) -> None:
        order = ""
        with contextlib.suppress(OSError):
            order = orders.read_text()
        if order:
            try:
                time.sleep(float(order))
            except ValueError:
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        sync(descriptor)

    return call


def main() -> None:
    orders = Path(sys.argv.pop(1))
    system: Any = os  # the types of os do not foresee this
    system.fsync = troubled(os.fsync, orders)
    system.fdatasync = troubled(os.fdatasync, orders)
    runpy.run_module("caserver", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
