"""``python -m edgeclip``."""

from __future__ import annotations

from edgeclip.cli import main

if __name__ == "__main__":
    main()
