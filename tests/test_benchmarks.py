# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmarks: verification, timing in pairs, shapes, goals, guard and report."""

import copy
import functools
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import timm_or_skip

pytest.importorskip("pytest_benchmark")
timm_or_skip()  # guard.py and report.py need all optional packages
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "lab")]
import bench_attention
import bench_limits
import bench_prompt_gate
import bench_vit
import gates
import goals
import guard
import harness
import host
import peers
import raw_ops
import report
import shapes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"device": "cpu", "batch": 2, "model": "ViT-S/16", "pixels": 32, "prompts": 3}
COMPILED = tuple(peers.COMPILED)


def eager(name):
    # tests/test_triton_gate.py checks the Triton peers
    return not name.endswith(COMPILED) and not name.startswith("triton")


# ---- a wrong result is not timed ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", shapes.GATES)
@pytest.mark.parametrize("work", [gates.Alone, gates.Chain])
@pytest.mark.parametrize("peer", list(filter(eager, peers.PEERS)))
def test_peers_are_right(peer, work, gate, dtype):
    if peer == "where" and gate == "full":
        pytest.skip("not for the full gate")
    for rule in shapes.AXES["rule"]:
        harness.check(work(shapes.Case(**SMALL, gate=gate, rule=rule, dtype=dtype), peer))


@pytest.mark.parametrize("work", [gates.Copy, gates.Gemms])
def test_limits_are_right(work):
    harness.check(work(shapes.Case(**SMALL, gate="linear")))


def test_quack_s_softmax_is_checked_and_moves_the_bytes_of_the_gate(monkeypatch):
    """With the formula in place of QuACK's functions, since the package needs a GPU."""

    def softmax_backward(gradient, out):
        return out * (gradient - (gradient * out).sum(-1, keepdim=True))

    quack = SimpleNamespace(softmax_fwd=lambda x: x.softmax(-1), softmax_bwd=softmax_backward)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(softmax=quack))
    monkeypatch.setitem(sys.modules, "quack.softmax", quack)
    case = shapes.Case(**SMALL)
    work = gates.QuackSoftmax(case)
    harness.check(work)
    row = case.size[2] * case.torch_dtype.itemsize
    for which, passes in (("forward, saving", 2), ("backward", 3)):
        missing = gates.bytes_moved(case)[which] - passes * row * work.rows[which]
        assert 0 <= missing < passes * row
    work.of_x = 1.1 * work.of_x
    with pytest.raises(AssertionError):
        work.verify()


def wrong_value(h, x, gate, start, length, rule):
    out = peers.original(h, x, gate, start, length, rule)
    return torch.cat([out[:, :-1], out[:, -1:] * 1.01], dim=1)


def wrong_gate_gradient(h, x, gate, start, length, rule):
    logit = 0.99 * gate[0] + 0.01 * gate[0].detach()
    return peers.original(h, x, [logit], start, length, rule)


def wrong_input_gradient(h, x, gate, start, length, rule):
    return peers.original(h, 0.99 * x + 0.01 * x.detach(), gate, start, length, rule)


@pytest.mark.parametrize("work", [gates.Alone, gates.Chain])
@pytest.mark.parametrize("fault", [wrong_value, wrong_gate_gradient, wrong_input_gradient])
def test_a_wrong_result_is_not_timed(fault, work, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "faulty", (fault, None))
    case = shapes.Case(**SMALL)
    benchmark = SimpleNamespace(pedantic=lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(AssertionError):
        harness.race(benchmark, work(case, "faulty"), work(case, "original"), "forward")


@pytest.mark.parametrize("peer", bench_vit.PEERS)
def test_steps_are_right_whatever_the_layout_of_gradients(peer):
    if bench_vit.unavailable_reason(peer):
        pytest.skip(bench_vit.unavailable_reason(peer))
    work = bench_vit.Model(shapes.Case(**SMALL, dtype="bfloat16"), "step", peer, "")
    harness.check(work)
    for index, gradient in enumerate(work.gradients):
        if gradient.dim() == 4:
            assert peer.endswith("full")
            work.gradients = list(work.gradients)
            work.gradients[index] = gradient.to(memory_format=torch.channels_last)
            assert not work.gradients[index].is_contiguous()
    work.verify()
    work.gradients = [0.5 * g for g in work.gradients]
    with pytest.raises(AssertionError, match="relative error"):
        work.verify()


# ---- timing ----


class Slept(harness.Work):
    """Advances a fake clock by `took` instead of working."""

    def __init__(self, name, took, log):
        self.name, self.device, self.took, self.log = name, "cpu", took, log
        self.checked = 0

    def infer(self):
        self.log.append(self.name)
        Slept.now += self.took

    forward = backward = infer

    def verify(self):
        self.checked += 1


class Benchmark:
    def __init__(self):
        self.extra_info, self.times = {}, []

    def pedantic(self, run, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            before = harness.clock()
            run()
            self.times.append(harness.clock() - before)


def test_a_row_runs_in_turns_with_its_rival(monkeypatch):
    Slept.now, log = 0.0, []
    monkeypatch.setattr(harness.time, "process_time", lambda: Slept.now)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: Slept.now)
    work, rival, benchmark = Slept("work", 0.03, log), Slept("rival", 0.01, log), Benchmark()
    median = harness.race(benchmark, work, rival, "forward+backward", budget=0.5)
    assert median == pytest.approx(0.06)  # forward and backward
    assert benchmark.times == pytest.approx([0.06] * len(benchmark.times))
    assert benchmark.extra_info["ratio"] == pytest.approx([3.0] * 3)
    assert benchmark.extra_info["over_us"] == pytest.approx([40_000] * 3)
    assert (work.checked, rival.checked) == (1, 1)
    turns = log[-8 * (len(benchmark.times) // 2) :: 2]
    assert turns[:8] in (
        ["rival", "work", "work", "rival"] * 2,
        ["work", "rival", "rival", "work"] * 2,
    )


@pytest.mark.parametrize("peer", host.PEERS)
def test_a_step_for_the_host_gives_all_gradients(peer):
    model = host.make(peer)
    times = host.step(model, torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long))
    assert all(time > 0 for time in times)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_interval_holds_the_median_and_widens_with_the_noise():
    assert harness.interval([5.0] * 9) == [5.0, 5.0, 5.0]
    low, middle, high = harness.interval(range(101))
    assert (low, middle, high) == (40, 50, 60)  # 50 +- 0.98 * sqrt(101)


@pytest.mark.parametrize("peer", ["gated_prompt, carrier", peers.TWO_CARRIERS])
def test_seed_hands_over_a_gradient_that_the_gate_writes_in_place(peer):
    work = gates.Alone(shapes.Case(**SMALL), peer)
    work.prepare()
    work.forward()
    pointer = work.seeds[0][0].data_ptr()
    work.backward()
    assert work.gradients[0].data_ptr() == pointer


def test_backward_fills_nothing_that_is_not_the_gates():
    """For gates in Alone with only the prompt rows as x, backward runs no op except ours."""
    work = gates.Alone(shapes.Case(**SMALL), peers.TWO_CARRIERS)
    work.prepare()
    work.forward()
    with torch.profiler.profile() as profile:
        work.backward()
    names = {event.name for event in profile.events()}
    assert "gated_prompt::prompt_gate_bwd_" in names
    assert not {"aten::ones_like", "aten::fill_", "aten::copy_", "aten::add_"} & names


def test_a_second_carrier_moves_one_more_pass_over_the_prompt_rows():
    case = shapes.Case("cuda", 64, dtype="bfloat16")
    rows = 64 * 50 * 768 * 2
    for peer, passes in (("gated_prompt", 4), (peers.TWO_CARRIERS, 5), ("device copy", 5)):
        moved = gates.bytes_moved(case, peer)
        assert moved["backward"] // rows == passes
        assert moved["forward, saving"] // rows == 4
        assert moved["forward+backward"] == moved["forward, saving"] + moved["backward"]


@pytest.mark.parametrize("work", [gates.Alone, gates.Chain])
@pytest.mark.parametrize("peer", ["gated_prompt", "gated_prompt, carrier", "original"])
def test_a_work_is_freed_when_nobody_has_it(work, peer):
    made = work(shapes.Case(**SMALL), peer)
    harness.check(made)
    reference = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert reference() is None
    finally:
        gc.enable()


# ---- shapes ----


def options(**flags):
    return SimpleNamespace(getoption=lambda name: flags.get(name))


def test_flags_choose_the_product():
    found = shapes.chosen(
        options(batch="1,64", dtype="bfloat16", gate="scalar,token"), "prompt_gate"
    )
    assert [(c.device, c.batch, c.gate) for c in found] == [
        (device, batch, gate)
        for device in ("cpu", "cuda")
        for batch in (1, 64)
        for gate in ("scalar", "token")
    ]
    assert {c.dtype for c in found} == {"bfloat16"}
    assert shapes.chosen(options(), "vit") == shapes.QUICK["vit"]
    named_none = shapes.chosen(options(prompts="9"), "vit")
    assert [(c.device, c.dtype) for c in named_none] == [("cpu", "float32"), ("cuda", "bfloat16")]
    linear = shapes.chosen(options(gate="all"), "prompt_gate_linear")
    assert {c.gate for c in linear} == {"linear", "linear-token"}
    with pytest.raises(ValueError, match=r"--models: wanted some of .*, got \['ViT-X'\]"):
        shapes.chosen(options(model="ViT-X"), "vit")


def test_benchmarks_collect_and_skip_without_a_gpu():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--device", "cuda", "-rs"]
    if torch.cuda.is_available():
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in done.stdout
        assert " passed" not in done.stdout


def test_goals_choose_their_rows_and_no_other():
    for ids, number in (("G4", 5), ("G1,G2", 31)):
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--collect-only"]
        command += ["--device", "cuda", "--goals", ids]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert f"{number}/" in done.stdout, done.stdout[-2000:]
    with pytest.raises(ValueError, match=r"--goals: wanted some of G1 to G14, got \['G99'\]"):
        goals.asked_for(["G99"])


def test_a_toy_goes_by_the_name_of_what_it_stands_for():
    case = shapes.Case("cuda", 64, dtype="bfloat16", gate="token")
    toy = case.toy()
    assert str(toy) == str(case)
    assert (toy.device, toy.dtype, toy.gate) == ("cpu", "bfloat16", "token")
    assert toy.size < case.size


def quick_rows(device):
    """Returns the fields that identify the rows of `device` that run without flags."""
    found = []
    for where, *row in bench_prompt_gate.rows(options()):
        found += [bench_prompt_gate.names(*row)] * (where == device)
    for where, *row in bench_vit.rows(options()):
        found += [bench_vit.names(*row)] * (where == device)
    for case in shapes.QUICK["limits"]:
        found += [bench_limits.names(case, what) for what in bench_limits.WORKS] * (
            case.device == device
        )
    return [{key: str(value) for key, value in names.items()} for names in found]


def test_all_rows_that_goals_ask_for_run_without_flags():
    rows = quick_rows("cuda")
    asked = [goal for goal in goals.GOALS if goal.device == "gpu" and goal.id != "G10"]
    assert {goal.id for goal in asked if goal.of} == {f"G{i}" for i in (*range(1, 10), 12, 13, 14)}
    for goal in asked:
        for wanted in filter(None, (goal.of, goal.over)):
            assert goals.matching(rows, wanted), f"{goal.id}, {goal.what}: no row {wanted}"


def test_rows_of_the_cpu_have_the_names_of_its_results():
    def key(row):
        return tuple(row.get(name) for name in ("suite", "case", "how", "which", "peer"))

    measured = {key(row) for row in report.load()["cpu"]["rows"] if row["suite"] != "attention"}
    assert measured - {key(row) for row in quick_rows("cpu")} == set()


@pytest.mark.parametrize(
    ("work", "order"),
    [
        (bench_limits.Copy, ["sleep", "event", "work", "event"]),
        (bench_limits.Gemm, ["sleep", "event", "work", "event"]),
        (harness.Graphed, ["sleep", "event", "work", "event"]),
        (bench_limits.Call, ["event", "work", "event"]),
        (gates.Alone, ["event", "work", "event"]),
    ],
)
def test_what_the_device_can_do_is_timed_without_the_host(work, order, monkeypatch):
    seen = []

    class Event(SimpleNamespace):
        def record(self):
            seen.append("event")

        def elapsed_time(self, other):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("sleep"))
    harness.Timer("cuda", work.ahead)(lambda: seen.append("work"))
    assert seen == order


def test_a_device_copy_is_of_whole_64_kib():
    copied = gates.Copy(shapes.Case(**SMALL))
    for which, size in copied.sizes.items():
        assert size % 2**16 == 0
        assert 2 * size >= gates.bytes_moved(copied.case)[which]


@pytest.mark.parametrize("gate", raw_ops.LOGITS)
def test_raw_ops_are_those_of_the_gate(gate):
    for dtype in ("float32", "bfloat16"):
        work = raw_ops.RawOps(shapes.Case(**SMALL, dtype=dtype), gate)
        harness.check(work)
        assert len(work.gradients) == len(work.saved) == work.calls
        for wrong in (work.inferred, work.sequences[-1], *work.gradients[-1][:2]):
            wrong.mul_(1.1)
            with pytest.raises(AssertionError, match="relative error"):
                work.verify()
            wrong.div_(1.1)
    work.verify()


def test_what_raw_ops_compares_has_all_that_a_graph_needs():
    for work in (gates.Copy, functools.partial(raw_ops.RawOps, gate="scalar")):
        made = work(shapes.Case(**SMALL))
        for name in ("prepare", "infer", "forward", "backward", "verify"):
            assert callable(getattr(made, name))


# ---- what a run leaves ----


@pytest.mark.parametrize(
    ("message", "is_skipped"),
    [
        ("No available kernel. Aborting execution.", True),
        ("tempered_attention: backend='xformers' can't run: no such head", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_a_backend_that_cannot_run_is_skipped(message, is_skipped):
    assert bool(bench_attention.CANT_RUN.search(message)) == is_skipped


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("what", "peer"), [row for row in bench_attention.ROWS if eager(row[1])])
def test_attention_is_right_or_says_that_it_cannot_run(what, peer, dtype):
    work = bench_attention.WORKS[what](shapes.Case(**SMALL, dtype=dtype), peer)
    if "xformers" in peer or peer in {f"sdpa {name}" for name in ("efficient", "cudnn")}:
        with pytest.raises((RuntimeError, ImportError)) as refused:  # they need CUDA
            harness.check(work)
        says = str(refused.value)
        assert bench_attention.CANT_RUN.search(says) or "xformers" in says
    else:
        harness.check(work)


# ---- guard and report ----


def baseline():
    peer = {"forward": 100, "backward": 200, "forward+backward": 300}
    kernel = {"registers": 32, "spills": 0, "stack": 0, "loads": 4, "stores": 4, "narrow": 0}
    return {
        "instructions": {"case": {"gated_prompt": peer, "gated_prompt, carrier": dict(peer)}},
        "kernels": {"prompt_gate_fwd_kernel<float, float, 1>": kernel},
    }


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("instructions", "case", "gated_prompt", "backward"), 210, "210 instructions"),
        (("kernels", "prompt_gate_fwd_kernel<float, float, 1>", "registers"), 40, "32 -> 40"),
        (("kernels", "prompt_gate_fwd_kernel<float, float, 1>", "loads"), 3, "loads 4 -> 3"),
        (("kernels", "prompt_gate_fwd_kernel<float, float, 1>", "spills"), 8, "spills 8"),
        (("kernels", "another"), {}, "another is new"),
        (("instructions", "another"), {}, "another is new"),
    ],
)
def test_guard_says_what_is_worse(path, value, said):
    now = baseline()
    assert list(guard.faults(now, baseline())) == []
    part = now
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = copy.deepcopy(value)
    (fault,) = guard.faults(now, baseline())
    assert said in fault


def test_guard_lets_pass_what_is_better():
    now = baseline()
    now["instructions"]["case"]["gated_prompt"]["forward"] = 50
    now["kernels"]["prompt_gate_fwd_kernel<float, float, 1>"] |= {"registers": 20, "loads": 8}
    assert list(guard.faults(now, baseline())) == []


def test_report_fills_tables_and_says_what_was_not_measured():
    row = {"suite": "gate", "case": "c", "how": "chain", "which": "forward", "peer": "original"}
    result = {"rows": [row | {"over_us": [1.0, 2.0, 3000.0], "median_us": 5.0}], "runs": []}
    page = "".join(f"<!-- table: {name} chain -->\nold\n<!-- end -->\n" for name in ("cpu", "gpu"))
    filled = report.fill(page, {"cpu": result})
    assert "| original | 2 [1, 3,000] |" in filled
    assert "old" not in filled
    assert f"<!-- table: gpu chain -->\n{report.NOT_MEASURED}\n<!-- end -->" in filled
    assert report.fill(filled, {"cpu": result}) == filled


def made_up(names, **figures):
    return {**names, "us": [9.0, 10.0, 11.0], **figures}


def test_goals_say_what_was_met_missed_and_not_measured():
    scalar, copy = (
        goals.gate(peers.TWO_CARRIERS, goals.SAVING, "B256 P50", "scalar mix"),
        goals.limit("copy"),
    )
    channel = scalar | {"case": scalar["case"].replace("scalar", "channel")}
    triton = goals.gate("triton", goals.BOTH)
    rows = [
        made_up(copy, gb_per_s=1000),
        made_up(scalar, gb_per_s=970, l2="cold", deterministic=False),
        made_up(channel, gb_per_s=900, l2="cold", deterministic=True),
        made_up(channel | {"peer": "device copy"}, gb_per_s=960, l2="cold"),
        made_up(triton, ratio=[0.96, 0.99, 1.1], l2="cold"),
    ]
    lines = [line for line in goals.lines({"gpu": rows}) if line[0] in ("G1", "G3")]
    by_what = {what: rest for _, what, *rest in lines}
    assert by_what["forward (4P), scalar gate, B256 P50: bandwidth of our gate / a large copy"] == [
        "≥ 0.97", "0.97 [0.794, 1.19]", "graph, L2 cold; two rows", "yes"
    ]  # fmt: skip
    missed = by_what["forward (4P), channel gate, B256 P50: bandwidth of our gate / a large copy"]
    assert missed[2:] == ["graph, L2 cold, strict; two rows", "no"]
    copied = "bandwidth of a copy of as many bytes / a large copy"
    assert by_what[f"forward (4P), channel gate, B256 P50: {copied}"] == [
        "", "0.96 [0.785, 1.17]", "graph, L2 cold; two rows", ""
    ]  # fmt: skip
    low_end = by_what[
        "gate, both passes, B64 P50: time of Triton / ours, low end; x's gradient is a sequence"
    ]
    assert low_end == ["≥ 0.97", "0.99 [0.96, 1.1]", "graph, L2 cold", "no"]
    absent = by_what["forward (4P), token gate, B256 P50: bandwidth of our gate / a large copy"]
    assert absent == ["≥ 0.97", report.NOT_MEASURED, "", ""]


def test_the_table_of_goals_has_what_was_measured_and_counts_the_rest():
    copy, step = goals.limit("copy"), goals.gate(peers.TWO_CARRIERS, goals.SAVING, "B256 P50")
    rows = [made_up(copy, gb_per_s=1000), made_up(step, gb_per_s=970, l2="cold")]
    table, counted = report.aims({"gpu": {"rows": rows}}).split("\n\n")
    assert report.NOT_MEASURED not in table
    assert table.count("| G1 |") == 1
    assert f"G1 ({len([goal for goal in goals.GOALS if goal.id == 'G1']) - 1})" in counted


def test_eleven_copies_are_a_part_of_a_step():
    copies, step = goals.gate("device copy", goals.BOTH), goals.step("vpt-shallow")
    rows = [made_up(copies, us=[20.0] * 3), made_up(step, us=[11_000.0] * 3)]
    ((_, what, bound, text, _, met),) = [
        line for line in goals.lines({"gpu": rows}) if "11 device copies" in line[1]
    ]
    assert (bound, text, met) == ("", "0.02", ""), what


def test_of_a_goal_for_any_shape_the_worst_counts():
    rows = []
    for shape, ours in (("ViT-B/16 224px B64 P50", 5.0), ("ViT-S/16 224px B64 P50", 20.0)):
        rows.append(made_up(goals.step("original, compiled", shape)))
        rows.append(made_up(goals.step("gated_prompt, compiled", shape), us=[ours] * 3))
    found = [line for line in goals.lines({"gpu": rows}) if line[0] == "G6"]
    assert [line[-1] for line in found] == ["yes", "no", ""]
    assert found[1][3] == "0.5 [0.45, 0.55]"


def test_runs_of_one_machine_are_one_result(tmp_path):
    run = {"command": "pytest", "cpu": "a", "gpu": {"name": "b"}, "torch": "2"}

    def write(name, *lines):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def test(name, outcome):
        return {"id": f"tests/{name}", "outcome": outcome}

    write(
        "gpu",
        *(run, {"suite": "gate", "us": 1}, {"suite": "limits"}),
        *(test("a", "failed"), test("b", "skipped"), test("c", "skipped"), test("d", "passed")),
        *(run | {"cpu": "another"}, {"suite": "gate", "us": 2}),  # same GPU in another machine
        *(test("b", "passed"), test("d", "skipped")),
        {"id": "benchmarks/x", "outcome": "skipped", "reason": "out of time"},
    )
    part = {"part": "memcheck", "outcome": "passed"}
    write("gpu-parts", part)
    result = report.load(tmp_path)["gpu"]
    assert len(result["runs"]) == 2
    assert [row["suite"] for row in result["rows"]] == ["gate", "limits", "tests"]
    assert result["rows"][0]["us"] == 2
    tests = {"suite": "tests", "peer": "tests", "passed": 2, "failed": 1, "skipped": 1}
    assert result["rows"][-1] == tests
    assert result["parts"] == {"memcheck": part}
    write("cpu", run)
    for device, other in (("gpu", {"gpu": {"name": "c"}}), ("cpu", {"cpu": "another"})):
        path = write(f"{device}-y", run | other)
        with pytest.raises(SystemExit, match="another machine"):
            report.load(tmp_path)
        path.unlink()


def test_tables_of_a_gpu_render_from_all_rows_and_from_any_one_of_them():
    """A run can end early, so any rows may be missing."""
    figures = ("median_us", "gb_per_s", "tflop_per_s", "images_per_s", "saved_bytes", "peak_bytes")
    figures = dict.fromkeys(figures, 2e9)
    figures |= dict.fromkeys(("ratio", "over_us", "host_us"), [1.0] * 3)
    of_attention = {"suite": "attention", "case": "c", "how": "layer", "which": "backward"}
    names = [*quick_rows("cuda"), of_attention | {"peer": "timm"}]
    rows = [made_up(each, **figures) for each in names]
    rows.append({"suite": "tests", "peer": "tests", "passed": 1234, "failed": 5, "skipped": 7})
    runs = [report.load()["cpu"]["runs"][0] | {"gpu": {"name": "H0", "cuda": "1"}}]
    racecheck = {"part": "racecheck", "says": "RACECHECK SUMMARY: 0 hazards"}
    of_all = {"runs": runs, "parts": {"racecheck": racecheck}}
    makers = [make for device, make in report.TABLES.values() if device == "gpu"]
    for make in makers:
        assert report.NOT_MEASURED not in make({"rows": rows, **of_all})
        for row in rows:
            make({"rows": [row], "runs": runs, "parts": {}})
    found = report.summary({"rows": rows, **of_all})
    assert "CUDA tests: 1,234 passed, 5 failed, 7 skipped." in found
    assert "compute-sanitizer: racecheck 0 hazards." in found
    assert found.count("| H0 |") == 1
    assert found.count(" µs |") == 6
    assert found.count(" ms |") == 4


def test_vpt_in_the_summary_is_what_ran_in_turns_with_ours():
    """Medians of two rows may be minutes apart."""
    ours = made_up(goals.step("gated_prompt"), median_us=29_200.0, ratio=[1.2, 1.25, 1.3])
    vpt = made_up(goals.step("vpt-shallow"), median_us=27_000.0)
    runs = [report.load()["cpu"]["runs"][0] | {"gpu": {"name": "H0", "cuda": "1"}}]
    table = report.summary({"rows": [ours, vpt], "runs": runs, "parts": {}})
    assert "| 29.2 (1.00) | 23.4 (0.80) |" in table


@pytest.mark.parametrize("page", ["benchmarks/README.md", "README.md", "docs/status.md"])
def test_the_page_is_what_the_results_say(page):
    page = (ROOT / page).read_text()
    assert report.fill(page, report.load()) == page
