# SPDX-License-Identifier: Apache-2.0
"""Laws of the tuning loop, on a ViT small enough to tune in a second."""

import copy

import pytest
import torch
from conftest import timm_or_skip
from torch.utils.data import TensorDataset

timm_or_skip()

from timm.models.vision_transformer import VisionTransformer

import gated_prompt as gp
from gated_prompt.job import tune as tuning
from gated_prompt.job.tune import (
    GraphedStep,
    TuneConfig,
    evaluate,
    pooled_features,
    seeded,
    tune,
    warmup_cosine,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TuneConfig(epochs=6, batch_size=16, lr=0.02, warmup_epochs=1, seed=3)


@pytest.fixture
def wrapped():
    """A function that wraps a copy of one tiny ViT, each time with the same prompts and head."""
    with seeded(1):
        vit = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3
        )

    def make(method):
        with seeded(2):
            options = {"num_prompts": 3, "gate_init": -1.0, "head": "vpt"}
            return gp.wrap(copy.deepcopy(vit), method=method, **options)

    return make


@pytest.fixture
def train_set():
    """50 images of three classes that differ in brightness. The last batch is smaller."""
    labels = torch.arange(50) % 3
    return TensorDataset(torch.randn(50, 1, 8, 8) + labels[:, None, None, None] - 1, labels)


def tuned_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["linear", "vpt-shallow", "gpt"])
def test_tuning_lowers_the_loss_and_leaves_the_backbone_bit_identical(wrapped, train_set, method):
    model = wrapped(method)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = tuned_parameters(model)
    losses = tune(model, train_set, CONFIG)
    assert len(losses) == CONFIG.epochs
    assert losses[-1] < 0.8 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", ["linear", "gpt"])
def test_same_seed_gives_the_same_numbers_and_another_seed_others(wrapped, train_set, method):
    def run(seed, state_of_the_caller):
        torch.manual_seed(state_of_the_caller)
        model = wrapped(method)
        return tune(model, train_set, TuneConfig(epochs=3, warmup_epochs=0, seed=seed)), model

    losses, model = run(5, 0)
    again, model_again = run(5, 1)
    other, _ = run(6, 0)
    assert losses == again
    assert all(map(torch.equal, model.parameters(), model_again.parameters()))
    assert losses != other


def test_same_seed_shows_every_method_the_same_order(wrapped, train_set):
    class Recorded(TensorDataset):
        def __getitem__(self, index):
            shown.append(index)
            return super().__getitem__(index)

    orders = []
    for method in ("linear", "vpt-shallow", "gpt"):  # prompt dropout draws numbers, too
        shown = []
        tune(wrapped(method), Recorded(*train_set.tensors), CONFIG)
        orders.append(shown)
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0][:50]) == list(range(50))
    assert orders[0][:50] != orders[0][50:100]


@pytest.mark.parametrize("cache_features", [False, True])
def test_random_state_of_the_caller_is_left_alone(wrapped, train_set, cache_features):
    model = wrapped("linear")
    before = torch.get_rng_state()
    tune(model, train_set, TuneConfig(epochs=2, warmup_epochs=0, cache_features=cache_features))
    evaluate(model, train_set)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("bias", "loss"), [(float("nan"), "nan"), (float("-inf"), "inf")])
def test_bad_loss_stops_before_the_step(wrapped, train_set, bias, loss):
    model = wrapped("gpt")
    model.head.bias.data[0] = bias
    before = tuned_parameters(model)
    with pytest.raises(RuntimeError, match=rf"loss must be finite, got {loss} in epoch 1 .*head"):
        tune(model, train_set, TuneConfig(epochs=1, warmup_epochs=0))
    for name, parameter in tuned_parameters(model).items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_cached_features_give_the_logits_of_the_whole_model(wrapped, train_set):
    whole, cached = wrapped("linear"), wrapped("linear")
    losses = tune(whole, train_set, CONFIG)
    cached_losses = tune(cached, train_set, TuneConfig(**{**vars(CONFIG), "cache_features": True}))
    torch.testing.assert_close(cached_losses, losses)
    images = train_set.tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(cached(images), whole(images))


def test_cached_features_are_refused_where_prompts_change_them(wrapped, train_set):
    with pytest.raises(ValueError, match='cache_features needs the method "linear", got "gpt"'):
        tune(wrapped("gpt"), train_set, TuneConfig(cache_features=True))


def test_empty_training_set_is_refused(wrapped):
    nothing = TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="train_set must have at least one image, got 0"):
        tune(wrapped("gpt"), nothing, CONFIG)


def test_evaluate_counts_in_eval_mode_and_puts_the_mode_back(wrapped, train_set):
    images, labels = train_set.tensors
    model = wrapped("vpt-shallow").eval()
    model.prompts.dropout.p = 0.9
    with torch.no_grad():
        right = (model(images).argmax(-1) == labels).sum().item()
    model.train()
    assert evaluate(model, train_set, batch_size=7) == right / len(labels)
    assert model.training
    assert not model.eval().training
    evaluate(model, train_set)
    assert not model.training


def test_pooled_features_are_what_the_head_reads_in_order(wrapped, train_set):
    model = wrapped("gpt").eval()
    features, labels = pooled_features(model, train_set, batch_size=7).tensors
    with torch.no_grad():
        torch.testing.assert_close(model.head(features), model(train_set.tensors[0]))
    assert torch.equal(labels, train_set.tensors[1])


def test_rates_warm_up_from_zero_and_end_at_zero():
    rates = [warmup_cosine(step, 2, 6) for step in range(7)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
    assert warmup_cosine(0, 0, 6) == 1


def test_each_group_is_tuned_at_its_own_rate(wrapped, train_set):
    model = wrapped("gpt")
    before = tuned_parameters(model)
    tune(model, train_set, TuneConfig(epochs=1, warmup_epochs=0, gate_lr=0.0, head_lr=0.0))
    still = {name for name, p in tuned_parameters(model).items() if torch.equal(p, before[name])}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: group["params"] for group in model.param_groups(lr=0.1)}
    assert still == {names[id(p)] for name in ("gates", "head") for p in groups[name]}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": -1}, "batch_size must be >= 1, got -1"),
        ({"epochs": 10}, r"warmup_epochs must be in \[0, epochs = 10\), got 10"),
        ({"warmup_epochs": -1}, r"warmup_epochs must be in \[0, epochs = 100\), got -1"),
    ],
)
def test_config_refuses_what_it_cannot_mean(field, message):
    with pytest.raises(ValueError, match=message):
        TuneConfig(**field)


# ---- a CUDA graph of the step ----


@pytest.fixture
def capture_on_cpu(monkeypatch):
    """Replaces the capture: a replay runs the step again, into the memory of the first run."""

    def capture(self):
        run = tuning._EagerStep(self.network)
        loss = run(self.images, self.labels)
        grads = [p.grad for p in self.parameters]

        def replay():
            self.replays = getattr(self, "replays", 0) + 1
            there = [p.grad for p in self.parameters]  # a graph replaces no .grad
            loss.copy_(run(self.images, self.labels))
            for grad, parameter, old in zip(grads, self.parameters, there, strict=True):
                grad.copy_(parameter.grad)
                parameter.grad = old

        return replay, loss

    monkeypatch.setattr(GraphedStep, "_capture", capture)


def steps(model, batches, step):
    """Runs a step on each batch; returns the losses and the tuned parameters."""
    optimizer = torch.optim.SGD(model.param_groups(lr=0.1), momentum=0.9)
    losses = []
    for images, labels in batches:
        losses.append(step(images, labels))
        optimizer.step()
    return torch.stack(losses).cpu(), tuned_parameters(model.cpu())


def batches_of(train_set, device="cpu"):
    """Batches of 16 images, with one of 5 in between."""
    images, labels = (t.to(device) for t in train_set.tensors)
    return [(images[i:j], labels[i:j]) for i, j in ((0, 16), (16, 32), (32, 37), (34, 50), (1, 17))]


def check_graphed_step(wrapped, train_set, device, tolerance):
    results = []
    for make in (lambda model, *batch: tuning._EagerStep(model), GraphedStep):
        model = wrapped("gpt").to(device)
        model.prompts.dropout.p = 0.0
        batches = batches_of(train_set, device)
        before = tuned_parameters(model)
        step = make(model, *batches[0])
        for name, parameter in tuned_parameters(model).items():
            assert torch.equal(parameter, before[name]), name
        results.append(steps(model, batches, step))
    (losses, tuned), (graphed_losses, graphed) = results
    torch.testing.assert_close(graphed_losses, losses, rtol=tolerance, atol=0)
    for name, parameter in graphed.items():
        torch.testing.assert_close(parameter, tuned[name], rtol=tolerance, atol=tolerance)
    return step


def test_a_graphed_step_is_the_eager_step(wrapped, train_set, capture_on_cpu):
    step = check_graphed_step(wrapped, train_set, "cpu", 0)
    assert step.replays == 4  # five batches, one of them smaller


def test_losses_of_a_graphed_step_stay(wrapped, train_set, capture_on_cpu):
    batches = batches_of(train_set)
    step = GraphedStep(wrapped("gpt"), *batches[0])
    losses = [step(*batch) for batch in batches[:2]]
    assert losses[0] != losses[1]


def test_a_graphed_step_under_autocast_needs_it_without_cache(wrapped, train_set, capture_on_cpu):
    model, batch = wrapped("gpt").eval(), batches_of(train_set)[0]  # eval: no dropout
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="cache_enabled"):
        GraphedStep(model, *batch)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        step = GraphedStep(model, *batch)
        assert torch.equal(step(*batch), step(*batch))


def test_cuda_graph_without_a_gpu_is_refused(wrapped, train_set):
    with pytest.raises(ValueError, match="tune: cuda_graph needs a model on a CUDA GPU, got one o"):
        tune(wrapped("gpt"), train_set, TuneConfig(cuda_graph=True))


@pytest.mark.cuda
def test_a_graphed_step_on_cuda(wrapped, train_set):
    check_graphed_step(wrapped, train_set, "cuda", 1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["linear", "gpt", "gpt-deep"])
def test_tuning_by_a_cuda_graph(wrapped, train_set, method):
    """The loss also falls with dropout, which draws other numbers than in an eager run."""
    model = wrapped(method).cuda()
    losses = tune(model, train_set, TuneConfig(**{**vars(CONFIG), "cuda_graph": True}))
    assert losses[-1] < losses[0]
