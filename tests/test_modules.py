# SPDX-License-Identifier: Apache-2.0
"""PromptGate and PromptTokens: parameters, initial values, and the functions they call."""

import math

import pytest
import torch

import gated_prompt as gp
from gated_prompt import reference
from gated_prompt.modules import GATES

B, N, D, P, START = 2, 9, 12, 3, 1
SIZES = {"dim": D, "num_prompts": P}


@pytest.mark.parametrize("rule", ["mix", "residual"])
@pytest.mark.parametrize("gate", GATES)
def test_module_is_its_function(device, gate, rule):
    module = gp.PromptGate(gate, rule, init=0.3, **SIZES).double().to(device)
    shape = {"dim": D, "num_prompts": P}
    parameter = module.logit if module.weight is None else module.weight
    assert parameter.shape == tuple(shape.get(size, size) for size in GATES[gate])
    torch.nn.init.normal_(parameter)
    h, x, grad = (torch.randn(B, N, D, dtype=torch.float64, device=device) for _ in range(3))
    results = []
    for use_module in (True, False):
        leaves = [h.clone().requires_grad_(), x.clone().requires_grad_(), *module.parameters()]
        if use_module:
            out = module(leaves[0] * 1, leaves[1], START, P)
        elif module.weight is None:
            out = reference.prompt_gate(*leaves[:2], module.logit, START, P, rule)
        else:
            gate_of = (module.weight, module.bias)
            out = reference.prompt_gate_linear(*leaves[:2], *gate_of, START, P, rule)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_starts_closed_or_as_a_linear_layer_does(gate):
    torch.manual_seed(3)
    module = gp.PromptGate(gate, dim=64, num_prompts=P)
    if module.weight is None:
        assert (module.logit == -5).all()
    else:
        torch.manual_seed(3)
        linear = torch.nn.Linear(64, len(module.weight))
        assert torch.equal(module.weight, linear.weight)
        assert torch.equal(module.bias, linear.bias)
        closed = gp.PromptGate(gate, dim=64, init=-5.0)
        assert (closed.bias == -5).all()
        assert closed.weight.abs().max() > 0
    assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (lambda: gp.PromptGate("sigmoid"), ValueError, "gate must be one of .*linear-token.*sigm"),
        (lambda: gp.PromptGate(rule="add"), ValueError, "rule must be one of .*'add'"),
        (lambda: gp.PromptGate("channel"), TypeError, "dim must be an int, got NoneType"),
        (lambda: gp.PromptGate("token", dim=4), TypeError, "num_prompts must be an int, got None"),
        (lambda: gp.PromptGate("linear", dim=0), ValueError, "dim must be at least 1, got 0"),
        (lambda: gp.PromptGate("full", dim=2, num_prompts=True), TypeError, "int, got bool"),
        (lambda: gp.PromptTokens(0, 4), ValueError, "num_prompts must be at least 1, got 0"),
        (lambda: gp.PromptTokens(2, 4, position="middle"), ValueError, "position must be one of"),
        (lambda: gp.PromptTokens(2, 4, init="zeros"), ValueError, "init must be one of .*'zeros'"),
    ],
)
def test_bad_options_get_their_error(make, error, pattern):
    with pytest.raises(error, match=pattern):
        make()


@pytest.mark.parametrize(("position", "start"), [("start", 2), ("end", N)])
def test_tokens_go_where_they_should(position, start):
    prompts = gp.PromptTokens(P, D, position=position, dropout=0.0)
    x = torch.randn(B, N, D)
    sequence, carrier, first = prompts(x, num_prefix_tokens=2)
    assert first == start
    assert torch.equal(sequence[:, start : start + P], prompts.tokens.expand(B, P, D))
    assert torch.equal(torch.cat([sequence[:, :start], sequence[:, start + P :]], dim=1), x)
    assert torch.equal(carrier, prompts.tokens.expand(B, P, D))


def test_tokens_start_as_vpts_or_normal():
    uniform = gp.PromptTokens(400, 768).tokens
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert 0.99 * bound < uniform.abs().max() <= bound
    assert abs(uniform.std() * math.sqrt(3) / bound - 1) < 0.01
    assert abs(gp.PromptTokens(400, 768, init="normal").tokens.std() - 1) < 0.01


def test_dropout_acts_on_the_prompts_in_training_alone():
    prompts = gp.PromptTokens(P, D, dropout=0.5)
    x = torch.randn(B, N, D)
    _, dropped, _ = prompts(x)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    sequence, carrier, _ = prompts.eval()(x)
    assert torch.equal(sequence[:, 1 : 1 + P], carrier)
    assert torch.equal(carrier, prompts.tokens.expand(B, P, D))
