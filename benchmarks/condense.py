# SPDX-License-Identifier: Apache-2.0
"""Medians of a benchmark run, from pytest-benchmark's JSON to the short one kept in results/.

python benchmarks/condense.py FILE benchmarks/results/cpu.json
"""

import json
import sys
from pathlib import Path

COMMAND = "pytest benchmarks --benchmark-only --benchmark-timer=time.process_time"


def condense(run):
    machine = run["machine_info"]
    build = machine["build"] | {"compiler": machine["build"]["compiler"].split()[-1]}
    return {
        "command": f"{COMMAND} --benchmark-json=FILE",
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
                **{k: v for k, v in row["extra_info"].items() if k == "bytes"},
                **{k: round(v, 3) for k, v in row["extra_info"].items() if k == "gb_per_s"},
            }
            for row in run["benchmarks"]
        ],
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(condense(json.loads(source.read_text())), indent=1) + "\n")
