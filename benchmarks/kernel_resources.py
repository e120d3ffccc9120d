# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and memory instructions of every CUDA kernel. Needs nvcc, no GPU.

    make resources

Compiles csrc/prompt_gate.cu for sm_90, reads ptxas' report, and disassembles the result. Fails if a
kernel spills, or moves one of the widest packs by anything but 128-bit loads and stores.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import gated_prompt_build as backend  # noqa: E402

FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-Xptxas=-v", "-cubin"]


def disassembler(toolkit):
    """nvdisasm of the toolkit, of PATH, or of triton's wheel."""
    candidates = [Path(toolkit, "bin", "nvdisasm"), Path(shutil.which("nvdisasm") or "none")]
    candidates += Path(sys.prefix).glob(
        "lib/python*/site-packages/triton/backends/nvidia/bin/nvdisasm"
    )
    return next((str(c) for c in candidates if c.is_file()), None)


def short_name(mangled):
    """prompt_gate_fwd_kernel<BFloat16, float, 8> from its mangled name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout
    text = re.sub(r"gated_prompt::|\(anonymous namespace\)::|\(int\)|^void ", "", text.strip())
    return text[: text.index(">") + 1]


def main():
    torch = backend.find_torch()
    toolkit = backend.find_toolkit(torch.cuda) if torch and torch.cuda else None
    if toolkit is None:
        sys.exit("kernel_resources: no CUDA toolkit of torch's major version was found")
    nvdisasm = disassembler(toolkit)
    if nvdisasm is None:
        sys.exit("kernel_resources: nvdisasm is neither in the toolkit nor in triton's wheel")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "prompt_gate.cubin")
        nvcc = [f"{toolkit}/bin/nvcc", *FLAGS, str(ROOT / "csrc/prompt_gate.cu"), "-o", str(cubin)]
        report = subprocess.run(nvcc, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True).stdout

    kernels = {}
    for entry in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", entry)[1]
        kernels[name] = {
            "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
            "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry)),
            "stack": int(re.search(r"(\d+) bytes stack", entry)[1]),
        }
    for section in re.split(r"\.section\s+\.text\.", sass)[1:]:
        name = re.match(r"\w+", section)[0]
        kernels[name]["loads"] = re.findall(r"\bLDG\.E(\S*)", section)
        kernels[name]["stores"] = re.findall(r"\bSTG\.E(\S*)", section)

    print(f"{'kernel (sm_90)':52} registers spills  LDG.128 LDG  STG.128 STG")
    faults = []
    for mangled, k in sorted(kernels.items(), key=lambda item: short_name(item[0])):
        name = short_name(mangled)
        wide_loads = sum(".128" in x for x in k["loads"])
        wide_stores = sum(".128" in x for x in k["stores"])
        print(
            f"{name:52} {k['registers']:9} {k['spills']:6} {wide_loads:8} {len(k['loads']):3} "
            f"{wide_stores:8} {len(k['stores']):3}"
        )
        if k["spills"] or k["stack"]:
            faults.append(f"{name} spills {k['spills']} bytes, stack {k['stack']}")
        types, width = re.search(r"<(.*), (\d)>", name).groups()
        narrowest = min({"double": 8, "float": 4}.get(t, 2) for t in types.split(", "))
        if int(width) * narrowest == 16:
            # beside the packs, a block stores one partial sum, and one block the result, in one of
            # four dtypes
            narrow_allowed = 5 if "bwd" in name else 0
            if wide_loads == 0 or len(k["stores"]) - wide_stores > narrow_allowed:
                faults.append(f"{name} moves a pack in pieces")
    print(f"{len(kernels)} kernels, {len(faults)} faults")
    if faults:
        sys.exit("kernel_resources: " + "; ".join(faults))


if __name__ == "__main__":
    main()
