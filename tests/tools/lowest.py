"""Print the lowest versions pyproject.toml allows for the base install, as constraints for pip."""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"]:
    match = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(?:;.*)?", requirement)
    if match is None:
        sys.exit(f"pyproject.toml: {requirement!r} names no lowest version; expected 'name>=version'.")
    print(f"{match[1]}=={match[2]}")
