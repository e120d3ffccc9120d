# SPDX-License-Identifier: Apache-2.0
"""Measures with torch.profiler where the time of a wrapped ViT's training step goes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gated_prompt import __version__
from gated_prompt.vit.wrap import wrap

WAIT, WARMUP = 2, 1  # steps that are not counted: compile and allocate; start the tracer
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Kinds of events, by path: the names of the enclosing events and the name of the event itself, as
# in FrozenProjection/aten::linear/aten::addmm. A pattern must match whole names. The first kind
# that matches is taken.
KINDS = {
    "optimiser": (r"Optimizer\.[^/]+",),
    "gate": (r"PromptGate(?:Linear)?Function(?:Backward)?", r"gated_prompt::prompt_gate_\w+"),
    "temperature": (  # the gradient of tau, and the query weights divided by tau
        r"gated_prompt::(?:scaled_dot|divide_rows)",
        r"_TemperedQuery(?:Backward)?",
    ),
    "attention": (r"aten::\w*scaled_dot_product\w*", r"_fMHA(?:Backward)?"),  # xformers'
    "residual adds and other elementwise": (r"aten::(?:add|mul|div|dropout)_?",),
    "copies and cat": (
        r"aten::(?:to|clone|cat|slice_backward|zeros)",
        r"(?<!addmm/)aten::copy_",  # except the bias copy of a GEMM
    ),
    "GEMMs": (r"aten::(?:linear|addmm_?|mm|matmul)", r"aten::conv\w+"),
    "layer norm": (r"aten::\w*layer_norm\w*",),
    "GELU": (r"aten::gelu\w*",),
    "fused by Inductor": (r"## Call CompiledFxGraph [^/]+$", r"triton_\w+"),
}
REST = "rest"  # the loss, views, autograd's overhead; on the CPU also Python between ops


@dataclass(frozen=True)
class ProfileConfig:
    """Times training steps of a wrapped ViT with random weights, split by kinds of work."""

    output_dir: Path = Path("profile_output")
    """Folder for table.json and trace.json; created if missing, files in it are replaced."""
    arch: str = "vit_base_patch16_224"
    """timm's name of the architecture."""
    img_size: int = 224
    """Height and width of the images in pixels."""
    batch_size: int | None = None
    """Images per step. None: 64 on CUDA, 4 on the CPU."""
    method: str = "gpt"
    """Tuning method, see `gp.wrap`: linear, full, bias, partial-k, vpt-shallow, vpt-deep, gpt or
    gpt-deep."""
    num_prompts: int = 50
    """Number of prompts; not used by methods without prompts."""
    gate: str = "scalar"
    """Kind of gate: scalar, channel, token, full, linear or linear-token, see `gp.wrap`."""
    rule: str = "mix"
    """Rule of the gate: mix, g*h + (1-g)*x; residual, x + g*h."""
    memory: str = "default"
    """default, or low: backward recomputes the MLP's hidden layer."""
    compile: bool = False
    """Compile the model with torch.compile."""
    device: str = "auto"
    """cuda, cpu, or auto: cuda if torch sees a GPU."""
    precision: str = "auto"
    """float32, bfloat16 (autocast), or auto: bfloat16 on CUDA, float32 on the CPU."""
    steps: int = 3
    """Counted steps; three steps before these are not counted."""

    def __post_init__(self) -> None:
        for name in ("img_size", "batch_size", "num_prompts", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ProfileConfig: {name} must be >= 1, got {value}")
        for name, allowed in (
            ("device", ("auto", "cpu", "cuda")),
            ("precision", ("auto", *PRECISIONS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"ProfileConfig: {name} must be one of {allowed}, got {value!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("ProfileConfig: device='cuda' needs a GPU, and torch sees none")
        if not timm.is_model(self.arch):
            raise ValueError(
                f"ProfileConfig: arch must be one of timm.list_models(), got {self.arch!r}"
            )


def run_profile(config: ProfileConfig) -> dict:
    """Profiles `config.steps` training steps, prints the table and writes it with the trace.

    Returns:
        The content of table.json.
    """
    console = Console(highlight=False, soft_wrap=True)
    config = _resolved(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with console.status(f"{WAIT + WARMUP + config.steps} steps"):
        profile = record(make_step(config), config.device, config.steps)
    events = profile.events()
    steps = [e for e in events if e.name.startswith("ProfilerStep") and _is_on_cpu(e)]
    kinds = attribute(events, config.device, config.steps)
    results = {
        "config": dataclasses.asdict(config) | {"output_dir": str(config.output_dir)},
        "versions": {
            "gated_prompt": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "device": _device_name(config.device),
        "step_ms": sum(e.cpu_time_total for e in steps) / 1e3 / config.steps,
        "time": "self CPU time" if config.device == "cpu" else "device time of kernels",
        "kinds": kinds,
    }
    profile.export_chrome_trace(str(config.output_dir / "trace.json"))
    (config.output_dir / "table.json").write_text(json.dumps(results, indent=2, allow_nan=False))
    report(results, config, console)
    return results


# ---- steps ------------------------------------------------------------------------------------


def _resolved(config: ProfileConfig) -> ProfileConfig:
    device, batch_size, precision = config.device, config.batch_size, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if batch_size is None:
        batch_size = 64 if device == "cuda" else 4
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
    return dataclasses.replace(config, device=device, batch_size=batch_size, precision=precision)


def make_step(config: ProfileConfig) -> Callable[[], None]:
    """Makes a training step: forward, cross entropy, backward, SGD. config must have no "auto"."""
    vit = timm.create_model(config.arch, img_size=config.img_size)
    names = ("method", "num_prompts", "gate", "rule", "memory")
    model = wrap(vit, **{name: getattr(config, name) for name in names})
    model.to(config.device).train()
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3), momentum=0.9)
    network = torch.compile(model) if config.compile else model
    size = (config.batch_size, vit.patch_embed.proj.in_channels, config.img_size, config.img_size)
    images = torch.randn(size, device=config.device)
    labels = torch.randint(model.num_classes, size[:1], device=config.device)
    dtype = PRECISIONS[config.precision]
    autocast = torch.autocast(config.device, dtype, enabled=dtype != torch.float32)

    def step():
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return step


def record(step: Callable[[], None], device: str, steps: int) -> torch.profiler.profile:
    """Profiles `steps` calls, after WAIT + WARMUP calls that are not counted."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:  # silences the error that a torch with CUDA logs if there is no GPU
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1)
    profile = torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True)
    with profile:
        for _ in range(WAIT + WARMUP + steps):
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            profile.step()
    return profile


# ---- attribution ------------------------------------------------------------------------------


@functools.cache
def kind_of(path: str) -> str:
    """The kind of an event with this path; REST if no kind matches."""
    for kind, patterns in KINDS.items():
        if re.search(f"(?:^|/)(?:{'|'.join(patterns)})(?:/|$)", path):
            return kind
    return REST


def attribute(events: Iterable, device: str, steps: int) -> list[dict]:
    """Splits the time of profiled steps by kinds of work; each microsecond counts for one kind.

    On the CPU we count self time: an event's time minus its children's. On CUDA, a kernel counts
    for the kind of the op that launched it, or for REST if that op is not known.

    Returns:
        {"kind", "ms", "percent", "calls"} for each of KINDS, most ms first, and then for REST; ms
        and calls are per step. A call on the CPU is an event whose parent is of another kind; on
        CUDA it is a kernel.
    """
    found = {kind: [0.0, 0] for kind in (*KINDS, REST)}
    pieces = _cpu_pieces(events) if device == "cpu" else _device_pieces(events)
    for kind, microseconds, calls in pieces:
        found[kind][0] += microseconds
        found[kind][1] += calls
    total = sum(microseconds for microseconds, _ in found.values())
    rows = [
        {
            "kind": kind,
            "ms": microseconds / 1e3 / steps,
            "percent": 100 * microseconds / total,
            "calls": calls / steps,
        }
        for kind, (microseconds, calls) in found.items()
    ]
    return sorted(rows, key=lambda row: (row["kind"] == REST, -row["ms"]))


def _cpu_pieces(events: Iterable) -> Iterator[tuple[str, float, int]]:
    """(kind, microseconds, calls) of each event."""
    for event in filter(_is_on_cpu, events):
        kind, parent = kind_of(_path(event)), event.cpu_parent
        is_call = parent is None or kind_of(_path(parent)) != kind
        yield kind, event.self_cpu_time_total, int(is_call)


def _device_pieces(events: Iterable) -> Iterator[tuple[str, float, int]]:
    """(kind, microseconds, calls) of each kernel, then the sum of the kernels of unknown ops."""
    of_device = [e for e in events if not _is_on_cpu(e) and not e.is_user_annotation]
    microseconds, calls = sum(e.time_range.elapsed_us() for e in of_device), len(of_device)
    for event in filter(_is_on_cpu, events):
        for kernel in event.kernels:
            if kernel.name != event.name:  # equal for the device range of an annotation
                yield kind_of(f"{_path(event)}/{kernel.name}"), kernel.duration, 1
                microseconds, calls = microseconds - kernel.duration, calls - 1
    yield REST, microseconds, calls


def _path(event) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return "/".join(reversed(names))


def _is_on_cpu(event) -> bool:
    return event.device_type == DeviceType.CPU


# ---- output -----------------------------------------------------------------------------------


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{platform.machine()} CPU, {instructions}, {threads} thread{'s' * (threads > 1)}"


def report(results: dict, config: ProfileConfig, console: Console) -> None:
    """Prints the table, the files, and on the last line the share of the gate."""
    title = (
        f"{config.arch}, {config.img_size} px, {config.method}, {config.num_prompts} prompts, "
        f"batch of {config.batch_size}, {config.precision}{', compiled' * config.compile}"
    )
    table = Table(title=title)
    for column in (results["time"], "ms a step", "share, %", "calls a step"):
        table.add_column(column, justify="left" if column == results["time"] else "right")
    for row in results["kinds"]:
        if row["calls"]:
            calls = "" if row["kind"] == REST else f"{row['calls']:.0f}"
            table.add_row(row["kind"], f"{row['ms']:.2f}", f"{row['percent']:.1f}", calls)
    console.print(table)
    versions = f"torch {results['versions']['torch']}"
    console.print(f"{results['step_ms']:.1f} ms a step, traced; {results['device']}; {versions}")
    for name in ("table.json", "trace.json"):
        console.print(f"  {config.output_dir / name}", markup=False)
    console.print(last_line(results["kinds"], config.compile))


def last_line(kinds: list[dict], is_compiled: bool) -> str:
    percent = {row["kind"]: row["percent"] for row in kinds}
    if is_compiled:
        return (
            f"fused by Inductor: {percent['fused by Inductor']:.1f} % of a step; these kernels "
            "include the gate and the ops around it, so the gate can't be measured separately"
        )
    return f"the gate: {percent['gate']:.1f} % of a step"
