# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own parts: what is timed is right; pairs are pairs; guard and report."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import timm_or_skip

pytest.importorskip("pytest_benchmark")
timm_or_skip()  # guard.py and report.py are for a whole environment
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gates
import guard
import harness
import peers
import report
import shapes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"device": "cpu", "batch": 2, "model": "ViT-S/16", "pixels": 32, "prompts": 3}
COMPILED = tuple(peers.COMPILED)


def eager(name):
    return not name.endswith(COMPILED) and name != "triton"  # Triton: tests/test_triton_gate.py


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


# ---- timing ----


class Slept(harness.Work):
    """Takes the time that a fake clock says."""

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


def test_interval_holds_the_median_and_widens_with_the_noise():
    assert harness.interval([5.0] * 9) == [5.0, 5.0, 5.0]
    low, middle, high = harness.interval(range(101))
    assert (low, middle, high) == (40, 50, 60)  # 50 +- 0.98 * sqrt(101)


def test_seed_hands_over_a_gradient_that_the_gate_writes_in_place():
    work = gates.Alone(shapes.Case(**SMALL), "gated_prompt, carrier")
    work.prepare()
    work.forward()
    pointer = work.seeds[0][0].data_ptr()
    work.backward()
    assert work.gradients[0].data_ptr() == pointer


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
    assert shapes.chosen(options(), "vit") is shapes.QUICK["vit"]
    linear = shapes.chosen(options(gate="all"), "prompt_gate_linear")
    assert {c.gate for c in linear} == {"linear", "linear-token"}
    with pytest.raises(ValueError, match=r"--models: wanted some of .*, got \['ViT-X'\]"):
        shapes.chosen(options(model="ViT-X"), "vit")


def test_benchmarks_collect_and_skip_without_a_gpu():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "cuda and not cpu", "-rs"]
    if torch.cuda.is_available():
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in done.stdout
        assert " passed" not in done.stdout


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
    result = {"rows": [row | {"over_us": [1.0, 2.0, 3000.0], "median_us": 5.0}]}
    page = "".join(f"<!-- table: {name} chain -->\nold\n<!-- end -->\n" for name in ("cpu", "gpu"))
    filled = report.fill(page, {"cpu": result})
    assert "| original | 2 [1, 3,000] |" in filled
    assert "old" not in filled
    assert f"<!-- table: gpu chain -->\n{report.NOT_MEASURED}\n<!-- end -->" in filled
    assert report.fill(filled, {"cpu": result}) == filled


def test_the_page_is_what_the_results_say():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert report.fill(page, report.load()) == page
