"""Write docs/bench-report.schema.json from the code: ``python tests/tools/write_bench_schema.py``."""

from __future__ import annotations

import json
from pathlib import Path

from edgeclip.bench.report import bench_schema

if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "bench-report.schema.json"
    path.write_text(json.dumps(bench_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
