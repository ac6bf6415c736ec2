"""Write the schemas of the bench commands' documents: ``python tests/tools/write_bench_schema.py``."""

from __future__ import annotations

import json
from pathlib import Path

from edgeclip.bench.compare import compare_schema
from edgeclip.bench.loadgen_report import loadgen_schema
from edgeclip.bench.report import bench_schema

SCHEMAS = {
    "bench-report": bench_schema,
    "bench-comparison": compare_schema,
    "loadgen-check": loadgen_schema,
}

if __name__ == "__main__":
    for name, schema in SCHEMAS.items():
        path = Path(__file__).parents[2] / "docs" / f"{name}.schema.json"
        path.write_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
