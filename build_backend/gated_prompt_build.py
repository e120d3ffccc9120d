# SPDX-License-Identifier: Apache-2.0
"""In-tree PEP 517 backend: setuptools' backend, but it builds against the torch the user has.

pip builds in an isolated environment. `import torch` fails there, and a torch listed as a build
requirement would not be the user's torch. So this backend looks for torch in the user's
environment, and asks pip for a torch only if there is none. It looks for a CUDA toolkit of torch's
major version, and asks pip for NVIDIA's compiler wheels if there is none. setup.py calls `plan()`
to get these decisions.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  all hooks; two are overridden below

MIN_TORCH = (2, 10)
# NVIDIA's wheels require each other without versions, so each is pinned to torch's CUDA minor.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)


def log(message: str) -> None:
    print(f"[gated_prompt] {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Torch:
    site: str  # folder that contains the package `torch`
    version: str
    cuda: str | None  # "13.0"; None for a CPU-only torch


@dataclass(frozen=True)
class Plan:
    torch: Torch
    cuda_home: str | None  # None: CPU only
    reason: str  # why CUDA is or is not built


def release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def site_folders() -> list[str]:
    """Returns folders that may contain the user's torch, most likely first."""
    paths = sysconfig.get_paths()  # pip runs the user's interpreter: these are its folders
    folders = [entry for entry in sys.path if entry] + [paths["purelib"], paths["platlib"]]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):  # uv runs a temporary interpreter
        if os.environ.get(variable):
            folders.append(os.path.join(os.environ[variable], "lib", python, "site-packages"))
    in_venv = sys.prefix != sys.base_prefix
    config = Path(sys.prefix, "pyvenv.cfg")
    sees_system = in_venv and config.is_file() and re.search(
        r"include-system-site-packages\s*=\s*true", config.read_text()
    )  # fmt: skip
    if sees_system:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        system = sysconfig.get_paths(vars=base)
        folders += [system["purelib"], system["platlib"]]
    if sees_system or not in_venv:
        folders.append(site.getusersitepackages())
    return [f for f in dict.fromkeys(map(os.path.abspath, folders)) if os.path.isdir(f)]


def find_torch() -> Torch | None:
    """Finds the user's torch and reads its version.py, without importing it."""
    for folder in site_folders():
        file = Path(folder, "torch", "version.py")
        if not file.is_file():
            continue
        text = file.read_text()
        version = re.search(r"^__version__\s*(?::[^=]*)?=\s*'([^']+)'", text, re.M)
        cuda = re.search(r"^cuda\s*(?::[^=]*)?=\s*'([^']+)'", text, re.M)
        if version is None:
            continue
        if release(version[1]) < MIN_TORCH:
            minimum = ".".join(map(str, MIN_TORCH))
            log(f"torch {version[1]} in {folder} is older than {minimum}: skipped")
            continue
        return Torch(folder, version[1], cuda[1] if cuda else None)
    return None


def is_toolkit(root: str) -> bool:
    parts = ("bin/nvcc", "include/cuda_runtime.h", "nvvm/bin/cicc")
    return all(os.path.exists(os.path.join(root, part)) for part in parts)


def toolkit_version(root: str) -> str | None:
    try:
        text = subprocess.run(
            [os.path.join(root, "bin", "nvcc"), "--version"], capture_output=True, text=True
        ).stdout
    except OSError:
        return None
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else None


def root_of_nvcc(nvcc: str | None) -> str | None:
    """Asks `nvcc`, which may be a link or a wrapper script, for the folder of its toolkit."""
    if nvcc is None:
        return None
    try:
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.M)
    return os.path.realpath(top[1].strip()) if top else None


def find_toolkit(cuda: str) -> str | None:
    """Finds a toolkit of torch's CUDA major version: the user's, or one from NVIDIA's wheels."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    roots += [root_of_nvcc(shutil.which("nvcc")), "/usr/local/cuda"]
    major = release(cuda)[0]
    for folder in site_folders():
        roots.append(os.path.join(folder, "nvidia", f"cu{major}"))
    for root in filter(None, roots):
        if not is_toolkit(root):
            if root == os.environ.get("CUDA_HOME"):
                log(f"CUDA_HOME={root} is not a complete CUDA toolkit: skipped")
            continue
        version = toolkit_version(root)
        if version is not None and release(version)[0] == major:
            return os.path.realpath(root)
        log(f"CUDA toolkit {version} in {root} does not fit torch's CUDA {cuda}: skipped")
    return None


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def wants_cuda(torch: Torch) -> tuple[bool, str]:
    if is_set("GATED_PROMPT_CPU_ONLY"):
        return False, "GATED_PROMPT_CPU_ONLY is set"
    if torch.cuda is None:
        return False, f"torch {torch.version} is a CPU-only build"
    return True, f"torch {torch.version} has CUDA {torch.cuda}"


def extra_requirements() -> list[str]:
    torch = find_torch()
    if torch is None:
        # nvcc can't be requested too: its version must match torch's, which pip has not chosen yet.
        # Without a pinned version, pip's resolver falls back to an older or a CPU-only torch.
        log("no torch found: the build environment gets the newest one, without nvcc")
        return [f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"]
    log(f"found torch {torch.version} (CUDA: {torch.cuda}) in {torch.site}")
    if wants_cuda(torch)[0] and find_toolkit(torch.cuda) is None:
        minor = ".".join(map(str, release(torch.cuda)))
        if release(torch.cuda)[0] >= 13:
            log(f"no CUDA {minor} toolkit found: nvcc comes from NVIDIA's wheels")
            return [f"{wheel}=={minor}.*" for wheel in NVCC_WHEELS]
    return []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + extra_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + extra_requirements()


def with_lib64(root: str) -> str:
    """Returns `root`, or a folder of links to it with the lib64 that NVIDIA's wheels lack."""
    if os.path.isdir(os.path.join(root, "lib64")):
        return root
    shim = os.path.abspath(os.path.join("build", "cuda_home"))
    shutil.rmtree(shim, ignore_errors=True)
    os.makedirs(os.path.join(shim, "lib64"))
    for part in ("bin", "include", "nvvm"):
        os.symlink(os.path.join(root, part), os.path.join(shim, part))
    for library in glob.glob(os.path.join(root, "lib", "lib*")):
        os.symlink(library, os.path.join(shim, "lib64", os.path.basename(library)))
    return shim


def plan() -> Plan:
    """Decides what setup.py builds. Makes torch importable and sets CUDA_HOME."""
    torch = find_torch()
    if torch is None:
        raise SystemExit("gated_prompt: building needs torch>=2.10 (pip install torch)")
    if torch.site not in sys.path:
        sys.path.append(torch.site)  # at the end, so that the isolated setuptools is imported first
    wanted, reason = wants_cuda(torch)
    home = find_toolkit(torch.cuda) if wanted else None
    if wanted and home is None:
        major = release(torch.cuda)[0]
        reason += f", but no CUDA {major} toolkit was found (set CUDA_HOME; see docs/building.md)"
    if home is None and is_set("FORCE_CUDA"):
        raise SystemExit(f"gated_prompt: FORCE_CUDA is set and CUDA can't be built: {reason}")
    if home is not None:
        home = with_lib64(home)
        os.environ["CUDA_HOME"] = home
    return Plan(torch, home, reason)
