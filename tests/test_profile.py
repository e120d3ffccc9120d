# SPDX-License-Identifier: Apache-2.0
"""`gated-prompt profile`, on a model so small that it takes a second: what it writes, and that no
time is lost or counted twice. The times themselves are not tested."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import timm_or_skip

timm = timm_or_skip()
pytest.importorskip("rich", reason="the profile needs rich: the extra tune")

import gated_prompt as gp
from gated_prompt.job import cli
from gated_prompt.job.profile import (
    KINDS,
    REST,
    ProfileConfig,
    _path,
    attribute,
    kind_of,
    last_line,
    make_step,
    record,
    run_profile,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ProfileConfig(
    arch="test_vit",
    img_size=32,
    batch_size=2,
    num_prompts=3,
    device="cpu",
    precision="float32",
    steps=2,
)
# Patterns that no step on a CPU matches: xformers attention and Triton kernels run on CUDA only.
CUDA_ONLY = {r"_fMHA(?:Backward)?", r"triton_\w+"}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Runs a tiny profile; returns (its result, its output folder, what it printed)."""
    output = tmp_path_factory.mktemp("profile") / "made" / "here"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("rich.console.Console.print", lambda self, *a, **_: printed.extend(a))
        results = run_profile(dataclasses.replace(TINY, output_dir=output))
    return results, output, printed


@pytest.fixture(scope="module")
def tiny_trace(tiny_run):
    """The complete events of trace.json."""
    events = json.loads((tiny_run[1] / "trace.json").read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def milliseconds(trace, *names):
    return sum(event["dur"] for event in trace if event["name"] in names) / 1e3


def test_table_file_holds_what_is_returned(tiny_run):
    results, output, _ = tiny_run
    assert json.loads((output / "table.json").read_text()) == results
    assert results["versions"]["torch"] == torch.__version__
    assert results["config"]["arch"] == "test_vit"
    assert results["time"] == "self CPU time"
    assert results["device"].endswith("1 thread")
    assert [row["kind"] for row in results["kinds"]][-1] == REST
    assert {row["kind"] for row in results["kinds"]} == {*KINDS, REST}


def test_the_trace_has_the_steps_and_our_ops(tiny_trace):
    names = [event["name"] for event in tiny_trace]
    assert sum(name.startswith("ProfilerStep#") for name in names) == TINY.steps
    for op in ("prompt_gate_fwd_", "prompt_gate_bwd_"):
        assert names.count(f"gated_prompt::{op}") == 5 * TINY.steps  # six blocks have five gates


def test_all_of_a_step_is_in_one_of_the_kinds(tiny_run, tiny_trace):
    results = tiny_run[0]
    assert sum(row["percent"] for row in results["kinds"]) == pytest.approx(100)
    steps = [e["dur"] for e in tiny_trace if e["name"].startswith("ProfilerStep#")]
    total = sum(row["ms"] for row in results["kinds"])
    assert total == pytest.approx(sum(steps) / 1e3 / TINY.steps, rel=1e-3)
    assert results["step_ms"] == pytest.approx(total, rel=1e-6)


def test_the_gate_is_its_forwards_and_backwards_whole(tiny_run, tiny_trace):
    (gate,) = (row for row in tiny_run[0]["kinds"] if row["kind"] == "gate")
    events = milliseconds(tiny_trace, "PromptGateFunction", "PromptGateFunctionBackward")
    assert gate["ms"] == pytest.approx(events / TINY.steps, rel=1e-3)
    assert gate["calls"] == 2 * 5
    assert tiny_run[2][-1] == f"the gate: {gate['percent']:.1f} % of a step"


def test_a_linear_gate_has_its_gemms():
    config = dataclasses.replace(TINY, gate="linear", rule="residual")
    events = record(make_step(config), "cpu", 1).events()
    of_gate = {_path(e).split("/")[-1] for e in events if kind_of(_path(e)) == "gate"}
    assert {"aten::addmm", "aten::mm", "gated_prompt::prompt_gate_fwd_"} <= of_gate


def test_every_pattern_is_of_real_events():
    """Also the patterns for compiled steps and for queries that are normalised, then divided."""
    normed = gp.wrap(timm.create_model("test_vit", img_size=32, depth=1, qk_norm=True))
    compiled = torch.compile(lambda x: torch.nn.functional.gelu(x * 2) + 1)
    images = torch.randn(2, 3, 32, 32)

    def other_step():
        normed(images).sum().backward()
        compiled(images)

    paths = set()
    for step in (make_step(TINY), other_step):
        paths |= {_path(event) for event in record(step, "cpu", 1).events()}
    for kind, patterns in KINDS.items():
        for pattern in patterns:
            seen = any(re.search(f"(?:^|/)(?:{pattern})(?:/|$)", path) for path in paths)
            assert seen != (pattern in CUDA_ONLY), (kind, pattern)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("ProfilerStep*/PromptGateFunction/gated_prompt::prompt_gate_fwd_/aten::empty", "gate"),
        # the sum that autograd takes after a gate's backward belongs to the residual connection
        (
            "autograd::engine::evaluate_function: PromptGateFunctionBackward/aten::add_",
            "residual adds and other elementwise",
        ),
        ("_FrozenProjection/gated_prompt::divide_rows/aten::empty", "temperature"),
        ("_FrozenProjection/aten::to/aten::_to_copy/aten::copy_", "copies and cat"),
        ("_FrozenProjection/aten::linear/aten::addmm/aten::copy_", "GEMMs"),
        ("aten::linear/aten::to/aten::_to_copy/aten::copy_", "copies and cat"),  # by autocast
        ("Optimizer.step#SGD.step/aten::mul_/aten::to", "optimiser"),
        ("## Call CompiledFxGraph f ##/aten::mm", "GEMMs"),
        ("## Call CompiledFxGraph f ##/aten::randint", REST),
        ("## Call CompiledFxGraph f ##/triton_poi_fused_add_0", "fused by Inductor"),
        ("CompiledFunctionBackward/## Call CompiledFxGraph f ##", "fused by Inductor"),
        ("ProfilerStep*", REST),
    ],
)
def test_the_kind_of_a_path(path, kind):
    assert kind_of(path) == kind


def test_on_cuda_kernels_count_by_the_op_that_launched_them():
    """Uses made-up events in the form that Kineto produces; not checked on a GPU."""
    from torch.autograd import DeviceType
    from torch.autograd.profiler_util import EventList, FunctionEvent

    def event(name, start, end, where=DeviceType.CPU, **options):
        return FunctionEvent(
            id=start, name=name, thread=1, start_us=start, end_us=end, device_type=where,
            use_device="cuda", **options,
        )  # fmt: skip

    optimizer = event("Optimizer.step#SGD.step", 70, 90, is_user_annotation=True)
    function = event("PromptGateFunction", 10, 30)
    op = event("gated_prompt::prompt_gate_fwd_", 12, 20)
    add = event("aten::add", 40, 50)
    optimizer.append_kernel(optimizer.name, 0, 15)
    op.append_kernel("prompt_gate_fwd_kernel", 0, 3)
    add.append_kernel("elementwise_kernel", 0, 5)
    shadow = event(optimizer.name, 80, 95, DeviceType.CUDA, is_user_annotation=True)
    kernels = [
        event("prompt_gate_fwd_kernel", 21, 24, DeviceType.CUDA),
        event("elementwise_kernel", 51, 56, DeviceType.CUDA),
        event("nobody's", 60, 62, DeviceType.CUDA),
    ]
    events = EventList([function, op, add, optimizer, shadow, *kernels], use_device="cuda")
    events._build_tree()
    rows = {row["kind"]: row for row in attribute(events, "cuda", 2) if row["calls"]}
    assert {kind: (row["ms"], row["percent"], row["calls"]) for kind, row in rows.items()} == {
        "residual adds and other elementwise": (0.0025, 50, 0.5),
        "gate": (0.0015, 30, 0.5),
        REST: (0.001, 20, 0.5),
    }


def test_a_compiled_gate_is_not_told_apart():
    rows = [{"kind": "gate", "percent": 0.0}, {"kind": "fused by Inductor", "percent": 12.34}]
    assert last_line(rows, is_compiled=False) == "the gate: 0.0 % of a step"
    line = last_line(rows, is_compiled=True)
    assert line.startswith("fused by Inductor: 12.3 % of a step; these kernels include the gate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"batch_size": -1}, "batch_size must be >= 1, got -1"),
        ({"device": "tpu"}, r"device must be one of \('auto', 'cpu', 'cuda'\), got 'tpu'"),
        ({"precision": "float16"}, "precision must be one of .*, got 'float16'"),
        ({"arch": "vit_bas"}, r"arch must be one of timm.list_models\(\), got 'vit_bas'"),
    ],
)
def test_config_refuses_what_it_does_not_know(options, message):
    with pytest.raises(ValueError, match=f"ProfileConfig: {message}"):
        ProfileConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_config_needs_the_gpu_it_asks_for():
    with pytest.raises(
        ValueError, match="ProfileConfig: device='cuda' needs a GPU, and torch sees"
    ):
        ProfileConfig(device="cuda")


def test_options_of_wrap_are_checked_by_wrap(tmp_path):
    with pytest.raises(ValueError, match="wrap: gate must be one of"):
        run_profile(dataclasses.replace(TINY, output_dir=tmp_path, gate="pixel"))


def test_command_line_shows_its_options(capsys):
    pytest.importorskip("tyro", reason="the command line needs tyro: the extra tune")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["profile", "--help"])
    printed = capsys.readouterr().out
    assert "--num-prompts INT" in printed
    assert "Counted steps" in printed
