"""Fails where the tests cover less than they have to; reads coverage.py's JSON report.

python3 tests/coverage_floor.py coverage.json
"""

import json
import sys
from pathlib import Path

# Percentages that the whole must reach.
FLOORS = {"lines": 95.0, "branches": 90.0}
COUNTS = {
    "lines": ("covered_lines", "num_statements"),
    "branches": ("covered_branches", "num_branches"),
}


def shares(summary: dict) -> dict[str, float]:
    """Per cent of the lines and of the branches of a file, or of all, that were run."""
    return {
        kind: 100 * summary[covered] / summary[total] if summary[total] else 100.0
        for kind, (covered, total) in COUNTS.items()
    }


def main(report_path: str) -> None:
    report = json.loads(Path(report_path).read_text())
    print(f"{'':<28}{'lines':>8}{'branches':>10}")
    summaries = {name: file["summary"] for name, file in sorted(report["files"].items())}
    for name, summary in (summaries | {"all": report["totals"]}).items():
        print(f"{name:<28}" + "{lines:>8.1f}{branches:>10.1f}".format(**shares(summary)))
    low = [kind for kind, share in shares(report["totals"]).items() if share < FLOORS[kind]]
    if low:
        sys.exit("too little covered: " + ", ".join(f"{kind} < {FLOORS[kind]:g} %" for kind in low))


if __name__ == "__main__":
    main(*sys.argv[1:])
