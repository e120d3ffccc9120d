# SPDX-License-Identifier: Apache-2.0
"""What the kernels cost beside what they cost before, in counts that no busy machine changes.

    make guard              # fails where a count is above baseline.json's
    make guard UPDATE=--update      # writes baseline.json, to be committed with the reason

Instructions of a call of each gate on the CPU by callgrind (instructions.py), at most TOLERANCE
above; registers of each CUDA kernel, no more than before, no spills, no fewer wide loads and stores
(kernel_resources.py). Both depend on compiler and torch: those of the baseline are needed.
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
    """What is worse in `now` than in `before`, and what there is no more, or new."""
    for part in ("instructions", "kernels"):
        for name in now[part].keys() ^ before[part].keys():
            yield f"{name} is {'new' if name in now[part] else 'no more'}: update the baseline"
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
    """A line for each case and each kernel, so that a change of one is a line in the diff."""
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
        sys.exit(f"guard: baseline.json is of {before['made_with']}, this of {now['made_with']}")
    found = list(faults(now, before))
    print(f"{len(now['instructions'])} cases, {len(now['kernels'])} kernels, {len(found)} faults")
    if found:
        sys.exit("guard:\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main()
