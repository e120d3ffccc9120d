# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions of our gate and of its peers on the CPU, with callgrind.

    python benchmarks/lab/instructions.py           # {case: {peer: {pass: instructions}}} as JSON

The script runs itself under valgrind and counts a call after warm-up calls. A count is of one call
on one thread, including Python and autograd. Valgrind has no AVX-512, so our kernels and PyTorch's
use AVX2. Counts are comparable only for the same compiler and the same torch.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the suite: benchmarks/
from gates import Alone
from harness import PASSES, seconds
from shapes import Case

PEERS = ("gated_prompt", "gated_prompt, carrier", "original", "slice assignment")


def cases():
    found = []
    for dtype in ("float32", "bfloat16"):
        found.append(Case("cpu", 8, dtype=dtype))
        for gate, rule in (("channel", "mix"), ("token", "residual"), ("full", "residual")):
            found.append(Case("cpu", 2, gate=gate, rule=rule, dtype=dtype))
        found.append(Case("cpu", 2, gate="linear-token", rule="residual", dtype=dtype))
    found.append(Case("cpu", 2, dtype="float16"))  # its loops are the hardest to vectorise
    found.append(Case("cpu", 1, pixels=16, prompts=1))  # almost only the cost of the call
    return found


def count():
    """Under valgrind: dumps the count of each pass of each work, and prints the names in order."""
    torch.set_num_threads(1)
    gc.disable()  # a collection during a call would be counted
    for case in cases():
        for peer in PEERS:
            gc.collect()
            work = Alone(case, peer)
            for which in PASSES:
                for counter in (uncounted, uncounted, counted):
                    seconds(work, which, counter)
                print(json.dumps([str(case), peer, which]), flush=True)


def uncounted(*functions):
    """Called like a harness.Timer; returns no times."""
    for function in functions:
        function()
    return (0, 0)


def counted(*functions):
    torch._C._valgrind_toggle()
    for function in functions:
        function()
    torch._C._valgrind_toggle_and_dump_stats()
    return (0, 0)


def collect():
    """Returns {case: {peer: {pass: instructions}}}."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "callgrind.out")
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--trace-children=no"]
        command += [f"--callgrind-out-file={prefix}", sys.executable, __file__, "--count"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"instructions: valgrind failed with exit status {done.returncode}")
        names = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        counts = {}
        for index, (case, peer, which) in enumerate(names, start=1):
            text = Path(f"{prefix}.{index}").read_text()
            found = int(re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)[1])
            counts.setdefault(case, {}).setdefault(peer, {})[which] = found
    return counts


if __name__ == "__main__":
    if sys.argv[1:] == ["--count"]:
        count()
    else:
        print(json.dumps(collect(), indent=1))
