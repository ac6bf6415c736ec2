"""Write docs/manifest.schema.json from the types in edgeclip/manifest.py: run it after changing them."""

from __future__ import annotations

import json
from pathlib import Path

from edgeclip.manifest import manifest_schema

TARGET = Path(__file__).parents[2] / "docs" / "manifest.schema.json"

if __name__ == "__main__":
    TARGET.write_text(json.dumps(manifest_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(TARGET)
