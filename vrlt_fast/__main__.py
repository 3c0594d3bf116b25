"""``python -m vrlt_fast`` is ``vrlt``."""

from __future__ import annotations

import sys

from vrlt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
