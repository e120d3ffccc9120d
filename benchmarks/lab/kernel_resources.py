# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and memory instructions of every CUDA kernel. Needs nvcc, no GPU.

    python benchmarks/lab/kernel_resources.py

Compiles csrc/*.cu for sm_90, reads ptxas' report, and disassembles the result. Fails if a kernel
spills or has a stack. Also fails if a kernel for the widest packs (16 bytes of its narrowest type)
moves a pack in pieces, which means one of:

* It has fewer 128-bit loads or stores than packs to move. `needed` has the numbers, derived from
  the structure of the sources; there are more if ptxas has unrolled a loop.
* One of the stores of Pack::store is narrower. These stores have the suffix .SM because of __stwb;
  stores of single elements (logits, their gradients, partial sums) do not have it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import gated_prompt_build as backend

FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-Xptxas=-v", "-cubin"]


def disassembler(toolkit):
    """Returns the path of nvdisasm in the toolkit, in PATH, or in triton's wheel."""
    candidates = [Path(toolkit, "bin", "nvdisasm"), Path(shutil.which("nvdisasm") or "none")]
    candidates += Path(sys.prefix).glob(
        "lib/python*/site-packages/triton/backends/nvidia/bin/nvdisasm"
    )
    return next((str(c) for c in candidates if c.is_file()), None)


PACKS_IN_FLIGHT = 2  # kPacksInFlight of launch.h
DIVIDE_PACKS = 4  # kDividePacks of divide_rows.h
SIZES = {"double": 8, "float": 4, "BFloat16": 2, "Half": 2}
LOGIT_SIZES = (8, 4, 2, 2)  # a logit, weight or gradient has one of four dtypes, known at run time


def short_names(mangled):
    """Returns {mangled: name like prompt_gate_strip_fwd_kernel<BFloat16, float, 8, true>}."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True)
    prefix = r"gated_prompt::|\(anonymous namespace\)::|\((int|bool)\)|^void "
    lines = (re.sub(prefix, "", line) for line in text.stdout.splitlines())
    return {key: line[: line.index(">") + 1] for key, line in zip(mangled, lines, strict=True)}


def needed(name):
    """For a kernel for the widest packs, returns (128-bit loads needed, 128-bit stores needed,
    narrower stores of packs allowed). Returns None for other kernels."""
    kernel, h, x, vector, *flags = re.findall(r"\w+", name)
    vector, is_streamed = int(vector), flags == ["true"]
    if vector * min(SIZES[h], SIZES[x]) != 16:
        return None
    out, into = (vector * SIZES[t] // 16 for t in (h, x))  # 128-bit words of a pack
    in_row = 3 if max(out, into) == 1 else 1  # kRowPacks of prompt_gate.cu
    # backward by strips: packs in a stage; loads of packs, doubled if it loads the next stage ahead
    stage, loads = (1, 1) if is_streamed or out > 1 else (PACKS_IN_FLIGHT, 2 * PACKS_IN_FLIGHT)
    # packs of logits or weights; the two 16-bit types may share a load instruction, but no store
    read_pack = sum(vector * size // 16 for size in LOGIT_SIZES[:3])
    write_pack = sum(vector * size // 16 for size in LOGIT_SIZES)
    narrow = sum(vector * size < 16 for size in LOGIT_SIZES)
    if kernel == "prompt_gate_fwd_kernel":
        return PACKS_IN_FLIGHT * (out + into), PACKS_IN_FLIGHT * 2 * out, 0
    if kernel == "prompt_gate_bwd_kernel":  # two loops: for a gate per sample, and for one gate
        return 4 * 3 * out, 2 * (out + into), 0
    if kernel == "prompt_gate_row_fwd_kernel":
        return in_row * (out + into), in_row * 2 * out, 0
    if kernel == "prompt_gate_row_bwd_kernel":
        return in_row * 3 * out, in_row * (out + into), 0
    if kernel == "prompt_gate_prompt_bwd_kernel":
        return 2 * in_row * 3 * out, in_row * (out + into), 0
    if kernel == "prompt_gate_strip_fwd_kernel":
        if is_streamed:
            return out + into + read_pack, 2 * out, 0
        return 2 * PACKS_IN_FLIGHT * (out + into), PACKS_IN_FLIGHT * 2 * out, 0
    if kernel == "prompt_gate_strip_bwd_kernel":
        moved = loads * 3 * out + is_streamed * read_pack
        return moved, stage * (out + into) + is_streamed * write_pack, is_streamed * narrow
    if kernel == "prompt_gate_linear_token_fwd_kernel":
        return 2 * out + into + read_pack, 3 * out, 0
    if kernel == "scaled_dot_kernel":
        return PACKS_IN_FLIGHT * (out + into), 0, 0
    if kernel == "divide_rows_kernel":
        return DIVIDE_PACKS * out, DIVIDE_PACKS * into, 0
    sys.exit(f"kernel_resources: needed() has no entry for {name}")


def compile_kernels(toolkit, nvdisasm, source):
    """Returns {mangled name: counts from ptxas' report and from the machine code}."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        nvcc = [f"{toolkit}/bin/nvcc", *FLAGS, str(source), "-o", str(cubin)]
        report = subprocess.run(nvcc, stderr=subprocess.PIPE, text=True, check=True).stderr
        sass = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True).stdout
    kernels = {}
    for entry in report.split("Compiling entry function ")[1:]:
        kernels[re.match(r"'(\w+)'", entry)[1]] = {
            "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
            "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry)),
            "stack": int(re.search(r"(\d+) bytes stack", entry)[1]),
        }
    for section in re.split(r"\.section\s+\.text\.", sass)[1:]:
        kernel = kernels[re.match(r"\w+", section)[0]]
        kernel["loads"] = sum(".128" in x for x in re.findall(r"\bLDG\.E(\S*)", section))
        stores = re.findall(r"\bSTG\.E(\S*)", section)
        kernel["stores"] = sum(".128" in x for x in stores)
        kernel["narrow"] = sum(x.endswith(".SM") and ".128" not in x for x in stores)
    return kernels


def faults_of(name, k):
    if k["spills"] or k["stack"]:
        yield f"{name} spills {k['spills']} bytes, stack {k['stack']}"
    if needed(name) is None:
        return
    loads, stores, narrow = needed(name)
    if k["loads"] < loads:
        yield f"{name} loads a pack in pieces: {k['loads']} 128-bit loads, {loads} needed"
    if k["stores"] < stores or k["narrow"] > narrow:
        yield (
            f"{name} stores a pack in pieces: {k['stores']} 128-bit stores, {stores} needed, "
            f"{k['narrow']} narrower ones, {narrow} allowed"
        )


def measure(sources=()):
    """Returns {kernel: {registers, spills, stack, loads, stores, narrow}}."""
    torch = backend.find_torch()
    toolkit = backend.find_toolkit(torch.cuda) if torch and torch.cuda else None
    if toolkit is None:
        sys.exit("kernel_resources: no CUDA toolkit of torch's major version was found")
    nvdisasm = disassembler(toolkit)
    if nvdisasm is None:
        sys.exit("kernel_resources: nvdisasm is neither in the toolkit nor in triton's wheel")
    kernels = {}
    for source in map(Path, sources or sorted((ROOT / "csrc").glob("*.cu"))):
        kernels |= compile_kernels(toolkit, nvdisasm, source)
    names = short_names(list(kernels))
    return {names[mangled]: kernels[mangled] for mangled in sorted(kernels, key=names.get)}


def main():
    kernels = measure(sys.argv[1:])
    print(f"{'kernel (sm_90)':60} registers spills stack  LDG.128 needed  STG.128 needed")
    faults = []
    for name, k in kernels.items():
        loads, stores, _ = needed(name) or ("", "", "")
        print(
            f"{name:60} {k['registers']:9} {k['spills']:6} {k['stack']:5} "
            f"{k['loads']:8} {loads:>6} {k['stores']:8} {stores:>6}"
        )
        faults += faults_of(name, k)
    print(f"{len(kernels)} kernels, {len(faults)} faults")
    if faults:
        sys.exit("kernel_resources: " + "\n  ".join(["", *faults]).strip())


if __name__ == "__main__":
    main()
