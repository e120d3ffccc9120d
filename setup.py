# SPDX-License-Identifier: Apache-2.0
"""Builds gated_prompt._C (CPU, always) and gated_prompt._C_cuda (if torch has CUDA and nvcc is
found).

Environment variables: TORCH_CUDA_ARCH_LIST ("9.0" or "8.0;9.0+PTX"), MAX_JOBS, CUDA_HOME,
GATED_PROMPT_CPU_ONLY=1, FORCE_CUDA=1 (fail if CUDA can't be built), GATED_PROMPT_WERROR=1. See
docs/building.md.
"""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "build_backend"))
import gated_prompt_build as backend

# pip's build isolation installs these; a build without isolation needs them installed.
BUILD_TOOLS = "pip install 'setuptools>=77,<82' wheel packaging ninja 'pybind11>=3.0'"

# Turing to Blackwell. The default is those that nvcc supports, the last one also as PTX.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# The bindings use the stable ABI of torch 2.10: one build works with 2.10 and all later versions.
TORCH_TARGET = "0x020a000000000000ULL"
HARDENING = [
    "-fstack-protector-strong",
    "-D_GLIBCXX_ASSERTIONS",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
]
LINK = [
    f"-Wl,{option}"
    for option in (
        "--strip-debug",
        "--as-needed",
        "--exclude-libs,ALL",
        "-z,relro,-z,now",
        "-z,noexecstack",
    )
]


def architecture_list(cuda_home: str) -> str:
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    nvcc = os.path.join(cuda_home, "bin", "nvcc")
    text = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    known = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in text.split()]
    return ";".join(known) + "+PTX"


def extensions():
    plan = backend.plan()
    try:
        import pybind11
    except ModuleNotFoundError:
        raise SystemExit(f"gated_prompt: building needs pybind11 ({BUILD_TOOLS})") from None
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Keeps object files between editable installs too: ninja compiles only what changed."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = f"build/temp-{sys.implementation.cache_tag}"

    # setuptools packs everything in build/lib*, even the CUDA module of an earlier build
    for folder in glob.glob("build/lib*"):
        shutil.rmtree(folder)
    # pybind11's headers come first: torch's copy is an #error under TORCH_STABLE_ONLY
    include = [pybind11.get_include(), os.path.abspath("csrc")]
    common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY"]
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # torch's headers have unused ones
    if os.environ.get("GATED_PROMPT_WERROR"):
        warnings.append("-Werror")
    here = f"-fmacro-prefix-map={os.getcwd()}/="  # messages name csrc/..., not the build's folder
    math = ["-ffp-contract=off", "-fno-trapping-math"]  # the latter lets g++ vectorise ?:
    cxx = ["-O3", here, *math, "-fvisibility=hidden", *warnings, *HARDENING, *common]
    cpu = CppExtension(
        "gated_prompt._C",
        ["csrc/bindings.cpp", *sorted(glob.glob("csrc/*_cpu.cpp"))],
        include_dirs=include,
        extra_compile_args={"cxx": [*cxx, f"-DGP_BUILD_TORCH={plan.torch.version}"]},
        extra_link_args=LINK,
    )
    cpu.libraries = ["torch_cpu"]
    built = [cpu]
    if plan.cuda_home is not None:
        architectures = architecture_list(plan.cuda_home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        threads = os.environ.get("MAX_JOBS") or 0  # 0: one per core
        # --threads: how many architectures nvcc compiles in parallel
        nvcc = ["-O3", "-fmad=false", "-lineinfo", f"--threads={threads}"]
        is_new = backend.release(backend.toolkit_version(plan.cuda_home)) >= (12, 6)
        if is_new and len(architectures.replace(";", " ").split()) == 1:
            nvcc.append(f"--split-compile={threads}")  # kernels in parallel, with twice the memory
        facts = [
            f"-DGP_NVCC={backend.toolkit_version(plan.cuda_home)}",
            f"-DGP_ARCHITECTURES={architectures.replace(';', ',').replace(' ', ',')}",
        ]
        cuda = CUDAExtension(
            "gated_prompt._C_cuda",
            ["csrc/bindings_cuda.cpp", *sorted(glob.glob("csrc/*.cu"))],
            include_dirs=include,
            extra_compile_args={
                "cxx": [*cxx, *facts, "-DUSE_CUDA"],
                "nvcc": nvcc,
            },
            extra_link_args=LINK,
        )
        # cudart is linked statically, so the module does not depend on which libcudart is installed
        cuda.libraries = ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
        built.append(cuda)
        backend.log(f"building CPU and CUDA ({architectures}) kernels: {plan.reason}")
    else:
        backend.log(f"building CPU kernels only: {plan.reason}")
    return {"ext_modules": built, "cmdclass": {"build_ext": Build}}


def is_building() -> bool:
    """Returns False for metadata and source archives, which need no torch and no compiler."""
    return not {"egg_info", "sdist", "dist_info", "clean"} & set(sys.argv[1:])


if backend.release(setuptools.__version__) < (77,):
    raise SystemExit(
        f"gated_prompt: building needs setuptools>=77, not {setuptools.__version__} ({BUILD_TOOLS})"
    )
os.chdir(Path(__file__).resolve().parent)
setuptools.setup(**(extensions() if is_building() else {}))
