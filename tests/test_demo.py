# SPDX-License-Identifier: Apache-2.0
"""Tests a tiny demo of a few seconds: its files and its reproducibility, not its accuracy."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import timm_or_skip

timm_or_skip()
pytest.importorskip("sklearn", reason="the demo needs scikit-learn (pip extra: tune)")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib (pip extra: tune)")
pytest.importorskip("rich", reason="the demo needs rich (pip extra: tune)")

from matplotlib import image

from gated_prompt.job import demo
from gated_prompt.job.demo import CONTRAST, DIGIT, SYSTEMS, DemoConfig, make_scene_sets, run_demo
from gated_prompt.job.plots import plot_gates

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = DemoConfig(
    seeds=2,
    pretrain_scenes=64,
    pretrain_steps=3,
    train_scenes=96,
    test_scenes=50,
    epochs=1,
)


def without_times(results):
    """Removes times and the output folder, which may differ between two runs."""
    if isinstance(results, dict):
        return {k: without_times(v) for k, v in results.items() if k not in ("seconds", "output")}
    return [without_times(v) for v in results] if isinstance(results, list) else results


def digits_shown(scenes):
    """Returns the digit pictures in the cells of the scenes, without the background, as bytes."""
    pixels = ((scenes[:, 0] + 1) / 2).numpy().reshape(len(scenes), 2, DIGIT, 2, DIGIT)
    cells = pixels.swapaxes(2, 3).reshape(-1, DIGIT, DIGIT)
    return {np.round(np.where(cell > CONTRAST, cell, 0) * 16).tobytes() for cell in cells}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "made" / "here"
    return run_demo(dataclasses.replace(TINY, output=output)), output


def test_results_file_holds_what_is_returned(tiny_run):
    results, output = tiny_run
    assert json.loads((output / "results.json").read_text()) == results
    assert set(results["methods"]) == set(SYSTEMS)
    for outcome in results["methods"].values():
        accuracies = [run["accuracy_percent"] for run in outcome["runs"]]
        assert len(accuracies) == TINY.seeds
        assert outcome["accuracy_percent"] == pytest.approx(np.mean(accuracies))
        assert outcome["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))


def test_table_shows_the_measured_numbers(tiny_run):
    results, output = tiny_run
    rows = [line.split(" | ") for line in (output / "table.md").read_text().splitlines()]
    for row, (method, outcome) in zip(rows[2:], results["methods"].items(), strict=False):
        assert row[0] == f"| {method}"
        assert row[1] == f"{outcome['accuracy_percent']:.1f} ± {outcome['accuracy_std']:.1f}"
        assert row[2] == f"{outcome['tuned_parameters']:,}"


def test_tuned_parameters_are_those_of_the_method(tiny_run):
    methods = tiny_run[0]["methods"]
    head, prompts = 64 * 10 + 10, TINY.num_prompts * 64
    assert methods["linear"]["tuned_parameters"] == head
    assert methods["vpt-shallow"]["tuned_parameters"] == head + prompts
    assert methods["gpt"]["tuned_parameters"] == head + prompts + 5 + 6
    linear_gates = 6 * (64 * 64 + 64)
    assert methods["gpt, linear gate"]["tuned_parameters"] == head + prompts + linear_gates


def test_pictures_are_written(tiny_run):
    for name in ("gates.png", "sample-scenes.png"):
        picture = image.imread(tiny_run[1] / name)
        assert picture[..., :3].std() > 0.05, f"{name} is blank"


def test_second_run_gives_the_same_numbers(tiny_run, tmp_path, monkeypatch):
    torch.manual_seed(123)  # the caller's random state must have no effect and must not change
    state, threads, threads_set = torch.get_rng_state(), torch.get_num_threads(), []
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(
        torch, "set_num_threads", lambda n: [threads_set.append(n), set_num_threads(n)]
    )
    again = run_demo(dataclasses.replace(TINY, output=tmp_path))
    assert without_times(again) == without_times(tiny_run[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert threads_set == [TINY.threads, 1, threads]


def test_tuning_seeds_differ(tiny_run):
    for outcome in tiny_run[0]["methods"].values():
        first, second = outcome["runs"]
        assert first["train_losses"] != second["train_losses"]


def test_test_scenes_share_no_digit_picture_with_the_others():
    unlabelled, train_set, test_set = make_scene_sets(DemoConfig(test_scenes=300))
    blank = {np.zeros((DIGIT, DIGIT), np.float32).tobytes()}
    test = digits_shown(test_set.tensors[0]) - blank
    seen = (digits_shown(unlabelled) | digits_shown(train_set.tensors[0])) - blank
    assert 200 < len(test) <= 300
    assert len(seen) == 1200  # all training pictures are found, so the next check can fail
    assert not test & seen


def test_masked_autoencoder_does_not_see_hidden_patches(monkeypatch):
    vit = demo.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=0
    )
    mae = demo.MaskedAutoencoder(vit)
    order = torch.rand(1, 16)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: order)
    scene = torch.randn(1, 1, 16, 16, requires_grad=True)
    encoded = []
    mae.embed.register_forward_hook(lambda module, inputs, output: encoded.append(output))
    mae(scene)
    (gradient,) = torch.autograd.grad(encoded[0].square().sum(), scene)
    reached = demo.F.unfold(gradient, 4, stride=4)[0].abs().amax(dim=0) > 0
    shown = order.argsort()[0, : mae.shown]
    assert set(reached.nonzero().flatten().tolist()) == set(shown.tolist())


def test_masked_autoencoder_learns():
    unlabelled, _, _ = make_scene_sets(dataclasses.replace(TINY, pretrain_scenes=512))
    console = demo.Console(quiet=True)
    config = dataclasses.replace(TINY, pretrain_steps=40)
    _, told = demo.pretrain(unlabelled, config, console, batch_size=64)
    assert told["last_loss"] < 0.95 * told["first_loss"]


def test_temperature_at_its_clamp_is_warned_of():
    reports = [{"temperatures": [1.0, 0.5]}, {"temperatures": [0.01, 1.0, 10.0]}]
    warnings = demo.clamp_warnings(reports)
    assert len(warnings) == 2
    assert "run 2" in warnings[0]
    assert "block 1" in warnings[0]
    assert "block 3" in warnings[1]


def test_plot_takes_the_report_of_a_method_without_gates(tmp_path):
    plot_gates({"gates": [], "temperatures": [], "selection": []}, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 0


def test_config_refuses_nothing_to_do():
    with pytest.raises(ValueError, match="pretrain_steps must be >= 1, got 0"):
        DemoConfig(pretrain_steps=0)
