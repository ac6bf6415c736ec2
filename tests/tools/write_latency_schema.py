"""Write docs/latency-report.schema.json from the code: ``python tests/tools/write_latency_schema.py``."""

from __future__ import annotations

import json
from pathlib import Path

from edgeclip.runtime.latency_report import latency_schema

if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "latency-report.schema.json"
    path.write_text(json.dumps(latency_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
