# SPDX-License-Identifier: Apache-2.0
"""Compares every method on every backbone with restated.py: features, gradients, steps."""

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip

timm_or_skip()

from restated import (
    GPT_DEEP,
    OPTIONS,
    SAMPLE,
    VITS,
    make_case,
    randomise,
    restated,
    small_vit,
    tuned,
)

import gated_prompt as gp

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equals_the_restated_method(model):
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    weights = torch.randn(2, 5, dtype=torch.float64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    wanted_features, wanted_logits = restated(model, images)
    logits = model(images)
    assert (features - wanted_features).abs().max() < 1e-9
    assert (logits - wanted_logits).abs().max() < 1e-9
    parameters = tuned(model)
    wanted = torch.autograd.grad(
        (wanted_logits * weights).sum(), list(parameters.values()), allow_unused=True
    )
    got = torch.autograd.grad(
        (logits * weights).sum(), list(parameters.values()), allow_unused=True
    )
    for name, a, b in zip(parameters, got, wanted, strict=True):
        if not name.endswith("k_norm.bias"):  # softmax does not depend on a bias of the keys
            assert b.abs().max() > 1e-6, f"{name}: a gradient of zero tests nothing"
        assert (a - b).abs().max() < 1e-9 * max(1, b.abs().max()), name


@pytest.mark.parametrize("vit", ["MAE-style", "MoCo-v3-style"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_wrapper_equals_the_restated_method(options, vit):
    assert_equals_the_restated_method(make_case(vit, options))


@pytest.mark.parametrize("vit", list(VITS)[2:])
@pytest.mark.parametrize("options", SAMPLE, ids=str)
def test_every_backbone_equals_the_restated_method(options, vit):
    assert_equals_the_restated_method(make_case(vit, options))


@pytest.mark.parametrize("options", [{"method": "gpt"}, GPT_DEEP], ids=str)
@pytest.mark.parametrize("temperature", [-3.0, 0.001, 40.0])
def test_clamped_temperatures_equal_the_restated_method(temperature, options):
    model = make_case("MAE-style", options)
    with torch.no_grad():
        model.temperatures[1].fill_(temperature)
    assert_equals_the_restated_method(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_steps_stay_equal_to_the_restated_method(options):
    images = torch.randn(4, 3, 40, 24, dtype=torch.float64)
    labels = torch.arange(4)
    ends = []
    for forward in (lambda model: model(images), lambda model: restated(model, images)[1]):
        torch.manual_seed(1)
        model = make_case("MAE-style", options)
        optimizer = torch.optim.SGD(model.param_groups(lr=0.02), momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(forward(model), labels).backward()
            optimizer.step()
        ends.append(model.tuned_parameters())
    start = make_case("MAE-style", options).tuned_parameters()
    for name in ends[0]:
        assert (ends[0][name] - ends[1][name]).abs().max() < 1e-8, name
        assert (ends[0][name] - start[name]).abs().max() > 1e-8, f"{name} did not move"


@pytest.mark.parametrize("logit", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("options", [{"method": "gpt"}, GPT_DEEP], ids=str)
def test_extreme_gates_equal_the_restated_method(options, logit):
    model = gp.wrap(small_vit(), num_prompts=4, prompt_dropout=0.0, **options)
    randomise(model, logit)
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    assert (model(images) - restated(model, images)[1]).abs().max() < 1e-9


@pytest.mark.parametrize("pool", ["cls", "patch", "prompt", "prompt+patch"])
@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("changes", [
    {"last_block": "auto"}, {"last_block": "all-rows"}, {"last_block": "pooled-rows"},
    {"memory": "low", "gated_blocks": 1}, {"method": "vpt-shallow"},
], ids=str)  # fmt: skip
def test_one_block_that_is_first_and_last_equals_the_restated_method(changes, position, pool):
    if "gated_blocks" in changes and "prompt" not in pool:
        pytest.skip("nothing reads what the gate changes")
    options = {"num_prompts": 4, "prompt_dropout": 0.0, "prompt_position": position, "pool": pool}
    model = randomise(gp.wrap(small_vit(depth=1), **options, **changes))
    assert_equals_the_restated_method(model)


@pytest.mark.parametrize("thawed", ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1"])
@pytest.mark.parametrize("changes", [{}, {"memory": "low", "pool": "patch"}], ids=str)
def test_what_is_thawed_by_hand_gets_its_whole_gradient(changes, thawed):
    model = make_case("MAE-style", {"method": "gpt", **changes})
    for block in model.backbone.blocks:
        block.get_submodule(thawed).requires_grad_(True)
    assert_equals_the_restated_method(model)
