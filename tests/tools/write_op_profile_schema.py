"""Write docs/op-profile.schema.json from the code: ``python tests/tools/write_op_profile_schema.py``."""

from __future__ import annotations

import json
from pathlib import Path

from edgeclip.bench.per_op import op_profile_schema

if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "op-profile.schema.json"
    path.write_text(json.dumps(op_profile_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
