# SPDX-License-Identifier: Apache-2.0
"""Medians of a benchmark run, from pytest-benchmark's JSON to the short one kept in results/.

python benchmarks/condense.py FILE benchmarks/results/cpu.json [what ran, if not all benchmarks]
"""

import json
import sys
from pathlib import Path

OPTIONS = "--benchmark-only --benchmark-timer=time.process_time --benchmark-json=FILE"
EXTRA = {"bytes": 0, "gb_per_s": 3, "ratio": 3, "images_per_s": 2, "saved_bytes": 0,
         "peak_bytes": 0, "tuned": 0}  # what is kept of extra_info, and its digits  # fmt: skip


def rounded(value, digits):
    return [rounded(v, digits) for v in value] if isinstance(value, list) else round(value, digits)


def condense(run, what="benchmarks"):
    machine = run["machine_info"]
    build = machine["build"] | {"compiler": machine["build"]["compiler"].split()[-1]}
    return {
        "command": f"pytest {what} {OPTIONS}",
        "commit": run["commit_info"]["id"] + "+" * run["commit_info"]["dirty"],  # +: and changes
        "cpu": machine["cpu"]["brand_raw"],
        "threads": 1,
        "python": machine["python_version"],
        "torch": machine["torch"],
        "build": build,
        "rows": [
            {
                "group": row["group"],
                "peer": row["extra_info"].get("peer") or row["params"]["peer"],
                "median_us": round(row["stats"]["median"] * 1e6, 2),
                "iqr_us": round(row["stats"]["iqr"] * 1e6, 2),
                "rounds": row["stats"]["rounds"],
                **{k: rounded(v, EXTRA[k]) for k, v in row["extra_info"].items() if k in EXTRA},
            }
            for row in run["benchmarks"]
        ],
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    short = condense(json.loads(source.read_text()), *sys.argv[3:])
    target.write_text(json.dumps(short, indent=1) + "\n")
