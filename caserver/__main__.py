"""``python -m caserver``."""

import sys

from caserver.cli import main

sys.exit(main())
