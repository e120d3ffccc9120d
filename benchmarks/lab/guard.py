# SPDX-License-Identifier: Apache-2.0
"""Compares the cost of the kernels with baseline.json, in counts that other load does not change.

    make guard              # fails if a count is worse than in baseline.json
    make guard UPDATE=--update      # writes baseline.json, to be committed with the reason

Counts are the instructions of a call of each gate on the CPU (instructions.py), which may grow by
TOLERANCE; and for each CUDA kernel its registers, which must not grow, its spills, which must be 0,
and its wide loads and stores, which must not become fewer (kernel_resources.py). The counts depend
on the compiler and torch, which must be the same as for the baseline.
"""

import json
import sys
from pathlib import Path

import instructions
import kernel_resources
import torch

from gated_prompt import ops

BASELINE = Path(__file__).parent / "baseline.json"
TOLERANCE = 0.02  # two runs of one build differed by less than 0.5 %


def made_with():
    build = ops.build_info()
    names = ("compiler", "nvcc")
    return {"torch": torch.__version__, **{k: build.get(k, "").split(" ")[-1] for k in names}}


def measure():
    return {
        "made_with": made_with(),
        "instructions": instructions.collect(),
        "kernels": kernel_resources.measure(),
    }


def faults(now, before):
    """Yields a message for each count of `now` that is worse than in `before`, and for each case or
    kernel that only one of them has."""
    for part in ("instructions", "kernels"):
        for name in now[part].keys() ^ before[part].keys():
            yield f"{name} is {'new' if name in now[part] else 'gone'}: update the baseline"
    for case in now["instructions"].keys() & before["instructions"].keys():
        for peer in ("gated_prompt", "gated_prompt, carrier"):
            for which, count in now["instructions"][case][peer].items():
                allowed = before["instructions"][case][peer][which] * (1 + TOLERANCE)
                if count > allowed:
                    yield f"{case}, {peer}, {which}: {count:,} instructions, at most {allowed:,.0f}"
    for name in now["kernels"].keys() & before["kernels"].keys():
        yield from kernel_resources.faults_of(name, now["kernels"][name])
        for what, sign in (("registers", 1), ("loads", -1), ("stores", -1)):
            new, old = now["kernels"][name][what], before["kernels"][name][what]
            if sign * new > sign * old:
                yield f"{name}: {what} {old} -> {new}"


def write(counts):
    """Writes the baseline with a line for each case and each kernel, for readable diffs."""
    parts = []
    for part, found in counts.items():
        rows = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(rows) + "\n }")
    BASELINE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main():
    now = measure()
    if sys.argv[1:] == ["--update"]:
        write(now)
        return
    before = json.loads(BASELINE.read_text())
    if before["made_with"] != now["made_with"]:
        sys.exit(f"guard: baseline.json needs {before['made_with']}, got {now['made_with']}")
    found = list(faults(now, before))
    print(f"{len(now['instructions'])} cases, {len(now['kernels'])} kernels, {len(found)} faults")
    if found:
        sys.exit("guard:\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main()
