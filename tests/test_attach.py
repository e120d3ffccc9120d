# SPDX-License-Identifier: Apache-2.0
"""`attach` on the models of other stacks equals the method in plain PyTorch.

`make neighbours` runs this file with the packages that are missing elsewhere.
"""

import concurrent.futures
import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from stacks import SIDE, STACKS, Eager, logits
from torch import nn
from torch.utils.checkpoint import checkpoint

import gated_prompt as gp

pytestmark = pytest.mark.usefixtures("one_thread")
LINEAR = {"gate": "linear", "rule": "residual", "start": 0}
OPTIONS = {
    "gpt": {},
    "vpt-shallow": {"method": "vpt-shallow"},
    "vpt-deep": {"method": "vpt-deep"},
    "gpt-deep": {"method": "gpt-deep", "gated_blocks": 1},
    "linear gate": LINEAR,
    "no temperature": {"temperature": False, "gate": "token"},
}


def attached(name, options="gpt", dtype=torch.float64):
    stack = STACKS[name]
    arguments = {"num_prompts": 3, "prompt_dropout": 0.0, **stack.options, **OPTIONS[options]}
    model = gp.attach(stack.model(), **arguments).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for part, parameter in model.gated_prompts.named_parameters():
            low, high = (0.5, 2.0) if "temperatures" in part else (-1.0, 1.0)
            parameter.uniform_(low, high)
    return model.to(dtype)


def eager(name, options, model):
    stack, plain = STACKS[name], gp.detach(copy.deepcopy(model))
    plain.requires_grad_(False)
    tuned = {
        n: p.detach().clone().requires_grad_() for n, p in model.gated_prompts.named_parameters()
    }
    return Eager(plain, stack, tuned, {**stack.options, **OPTIONS[options]}), tuned


def images(batch=3, dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(batch, 3, SIDE, SIDE, dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", STACKS)
def test_equals_the_method_in_plain_pytorch(name, options):
    model = attached(name, options)
    restated, tuned = eager(name, options, model)
    x = images()
    got, wanted = logits(model, x), restated(x)
    assert (got - wanted).abs().max() < 1e-10
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    for part, parameter in model.gated_prompts.named_parameters():
        assert tuned[part].grad.abs().max() > 1e-7, f"{part}: a gradient of zero tests nothing"
        torch.testing.assert_close(parameter.grad, tuned[part].grad, rtol=1e-8, atol=1e-10)


def steps_of(model, run, parameters, dtype, count=6):
    """Losses of SGD with momentum, gradient clipping and two batches for each step."""
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    torch.manual_seed(3)
    data = [(torch.randn(2, 3, SIDE, SIDE, dtype=dtype), torch.arange(2) + i) for i in range(2)]
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        for x, labels in data:
            loss = F.cross_entropy(run(model, x), labels) / 2
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", STACKS)
def test_losses_of_training_equal_those_of_plain_pytorch(name):
    """The head is left frozen here: stacks do not all have one."""
    model = attached(name, "gpt", torch.float32).train()
    restated, tuned = eager(name, "gpt", model)
    got = steps_of(model, logits, list(model.gated_prompts.parameters()), torch.float32)
    wanted = steps_of(restated, lambda m, x: m(x), list(tuned.values()), torch.float32)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert got[-1] < got[1] - 1e-4


@pytest.mark.parametrize("name", STACKS)
def test_copies_are_independent_and_complete(name):
    """A deep copy (as an EMA makes), a pickle and a state dict."""
    model, x = attached(name), images()
    wanted = logits(model, x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.gated_prompts.parameters():
            parameter.add_(0.3)
    assert torch.equal(logits(model, x), wanted)
    assert (logits(copied, x) - wanted).abs().max() > 1e-6
    logits(copied, x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in copied.gated_prompts.parameters())
    copied.load_state_dict(model.state_dict())
    assert torch.equal(logits(copied, x), wanted)
    if type(model).__qualname__.count("<locals>") == 0:
        assert torch.equal(logits(pickle.loads(pickle.dumps(model)), x), wanted)


@pytest.mark.parametrize("name", STACKS)
def test_detach_gives_the_model_back(name):
    stack = STACKS[name]
    model, x = stack.model(), images()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    wanted, names, hooks = logits(model, x), list(model.state_dict()), hooks_of(model)
    gp.attach(model, num_prompts=3, **stack.options)
    assert hooks_of(model) != hooks
    with pytest.raises(RuntimeError, match="attach: model has gated prompts already"):
        gp.attach(model, num_prompts=3, **stack.options)
    assert gp.detach(model) is model
    assert hooks_of(model) == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model, x), wanted)
    with pytest.raises(TypeError, match="detach: model must be what attach returned"):
        gp.detach(model)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
             "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("name", STACKS)
def test_autocast_rounds_and_nothing_more(name):
    model, x = attached(name, "gpt", torch.float32), images(dtype=torch.float32)
    wanted = logits(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, x)
    got.float().sum().backward()
    assert (got.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    for parameter in model.gated_prompts.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("name", STACKS)
def test_checkpointed_blocks_have_the_same_gradients(name):
    """The stack's own switch where there is one; otherwise a forward on the block that calls
    torch.utils.checkpoint."""
    model, x = attached(name).train(), images()
    parameters = list(model.gated_prompts.parameters())
    wanted = torch.autograd.grad(logits(model, x).sum(), parameters)
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        for block in model.get_submodule(STACKS[name].blocks):
            forward = type(block).forward
            block.forward = lambda *a, f=forward, b=block, **k: checkpoint(
                f, b, *a, use_reentrant=False, **k
            )
    got = torch.autograd.grad(logits(model, x).sum(), parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STACKS)
def test_a_compiled_model_gives_the_same(name):
    model, x = attached(name), images()
    parameters = list(model.gated_prompts.parameters())
    wanted = torch.autograd.grad(logits(model, x).sum(), parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = logits(compiled, x)
    torch.testing.assert_close(out, logits(model, x), rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out.sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_let_everything_attend_to_the_prompts(kind):
    """torch.nn: True masks. The last two tokens are masked for all others."""
    model, name = attached("torch.nn", "no temperature"), "torch.nn"
    restated, _ = eager(name, "no temperature", model)
    x = model.patch_embed(images())
    n = x.shape[1]
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[:-2, -2:] = True
    wide = torch.zeros(n + 3, n + 3, dtype=torch.bool)
    wide[:1, -2:] = wide[4:-2, -2:] = True  # start 1, three prompts
    if kind == "float":
        mask, wide = (
            torch.zeros(m.shape, dtype=x.dtype).masked_fill(m, -1e9) for m in (mask, wide)
        )
    wanted = x
    for block in restated.model.encoder.layers:
        wanted = block(wanted, src_mask=wide)
    got = model.encoder(x, mask=mask)
    assert (got - wanted).abs().max() < 1e-10
    assert (got - model.encoder(x)).abs().max() > 1e-6


@pytest.mark.parametrize("name", STACKS)
def test_training_resumes_from_state_dicts_and_an_ema_follows(name):
    """Six steps equal three, saved and loaded into a new process's model, and three more. The EMA
    is timm's: a deep copy, made frozen."""
    timm_utils = pytest.importorskip("timm.utils")
    x, labels = images(), torch.arange(3)

    def steps(model, optimizer, ema, count=3):
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(logits(model, x), labels).backward()
            optimizer.step()
            ema.update(model)

    def make():
        model = attached(name)
        tuned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(tuned, lr=0.05)
        return model, optimizer, timm_utils.ModelEmaV3(model, decay=0.5)

    whole, first, second = make(), make(), make()
    steps(*whole, count=6)
    steps(*first)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file), strict=True):
        part.load_state_dict(state)
    steps(*second)
    for got, wanted in ((second[0], whole[0]), (second[2].module, whole[2].module)):
        assert torch.equal(logits(got, x), logits(wanted, x))
    assert (logits(whole[2].module, x) - logits(whole[0], x)).abs().max() > 1e-6


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, attention_mask=None):
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, 2))
        return x + F.scaled_dot_product_attention(q, k, v, attention_mask).squeeze(1)


@pytest.mark.parametrize("form", ["rows", "one row", "added"])
def test_padding_stays_hidden_behind_the_prompts(form):
    """The last two of five tokens are masked for all: what is in them must not reach the others,
    through the prompts neither. True attends."""
    model = nn.Module()
    model.layers = nn.ModuleList([Masked() for _ in range(3)]).double()
    gp.attach(model, num_prompts=3, blocks="layers", query="qkv", head=False).double()
    for gate in model.gated_prompts.gates:
        nn.init.ones_(gate.logit)
    mask = torch.ones(2, 1, 1 if form == "one row" else 5, 5, dtype=torch.bool)
    mask[..., 3:] = False
    if form == "added":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)

    def run(x, mask):
        for layer in model.layers:
            x = layer(x, attention_mask=mask)
        return x

    model.eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    changed = torch.cat([x[:, :3], x[:, 3:] + 1], dim=1)
    got = run(x, mask)
    assert torch.equal(run(changed, mask)[:, :3], got[:, :3])
    assert (run(x, None)[:, :3] - got[:, :3]).abs().max() > 1e-3
    got.sum().backward()
    assert model.gated_prompts.prompts.tokens.grad.abs().max() > 1e-3
    with pytest.raises(TypeError, match=r"a mask must be boolean, .* got torch\.int64"):
        run(x, torch.ones(2, 5, dtype=torch.int64))


# ---- what is refused ----


def two_towers():
    return nn.ModuleDict({"image": STACKS["DINO"].model(), "text": STACKS["DINO"].model()})


class Normed(nn.Module):
    """Divides before it normalises, so a temperature would be lost."""

    def __init__(self):
        super().__init__()
        self.to_q, self.q_norm = nn.Linear(16, 16), nn.LayerNorm(16)


def with_layers(*layers):
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


def compiled_block():
    model = STACKS["DINO"].model()
    model.blocks[1].compile(backend="eager")
    return model


def block_twice():
    model = STACKS["DINO"].model()
    model.blocks[2] = model.blocks[0]
    return model


def named_like_ours():
    model = STACKS["DINO"].model()
    model.gated_prompts = nn.Linear(2, 2)
    return model


def own_multihead():
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = STACKS["torchvision"].model()
    for block in model.encoder.layers:
        block.self_attention = Own(16, 2, batch_first=True).double()
    return model


def patched_multihead():
    model = STACKS["torchvision"].model()
    attention = model.encoder.layers[1].self_attention
    attention.forward = functools.partial(type(attention).forward, attention)
    return model


def outer_attached():
    outer = nn.Module()
    outer.visual = STACKS["DINO"].model()
    return gp.attach(outer, num_prompts=3, head=False)


REFUSED = {
    "method": ("DINO", {"method": "linear"}, ValueError, "method must be one of"),
    "gate": ("DINO", {"gate": "both"}, ValueError, "gate must be one of"),
    "rule": ("DINO", {"rule": "add"}, ValueError, "rule must be one of"),
    "batch_dim": ("DINO", {"batch_dim": 2}, ValueError, r"batch_dim must be one of \(0, 1\)"),
    "start": ("DINO", {"start": -1}, ValueError, "start must be an int of at least 0, got -1"),
    "temperature": ("DINO", {"temperature": 20.0}, ValueError, r"temperature must be .*\[0.01"),
    "temperature nan": ("DINO", {"temperature": float("nan")}, ValueError, "temperature must be"),
    "prompts": ("DINO", {"num_prompts": 0}, ValueError, "num_prompts must be at least 1, got 0"),
    "gated blocks": ("DINO", {"gated_blocks": 3}, ValueError, r"must be in \[0, 2\], got 3"),
    "gates of vpt": (
        "DINO", {"method": "vpt-deep", "gated_blocks": 1}, ValueError, r"must be in \[0, 0\]",
    ),
    "blocks": ("DINO", {"blocks": "layers"}, ValueError, "blocks='layers' is not in model"),
    "no list": ("DINO", {"blocks": "norm"}, ValueError, "must be a nn.ModuleList or nn.Sequential"),
    "query": ("DINO", {"query": "attn.q"}, ValueError, "query='attn.q' is not in the block"),
    "head": ("DINO", {"head": "classifier"}, ValueError, "head='classifier' is not in Dino"),
    "unknown query": ("own", {"blocks": "encoder.layers"}, ValueError, "give query=, or use temp"),
    "unknown blocks": ("own", {}, TypeError, "must have one list of blocks .* got 0 in MyModel"),
    "two lists": (two_towers, {}, TypeError, "got 2 in ModuleDict: 'image.blocks', 'text.blocks'"),
    "q_norm": (
        lambda: with_layers(Normed()), {"blocks": "layers", "query": "to_q"}, ValueError,
        "before q_norm normalises them",
    ),
    "cross attention": (
        lambda: with_layers(nn.MultiheadAttention(16, 2, kdim=8, batch_first=True)),
        {"blocks": "layers", "query": ""}, ValueError, "must be self-attention",
    ),
    "one deep block": (
        lambda: with_layers(nn.TransformerEncoderLayer(16, 2, batch_first=True)),
        {"blocks": "layers", "method": "vpt-deep"}, ValueError, "at least 2 blocks, got 1",
    ),
    "meta": (lambda: STACKS["DINO"].model().to("meta"), {}, RuntimeError, "meta device"),
    "compiled": (lambda: torch.compile(STACKS["DINO"].model()), {}, TypeError, "is compiled"),
    "compiled block": (compiled_block, {}, TypeError, "a part of it is compiled"),
    "twice": (block_twice, {}, ValueError, "each block must be another module"),
    "Sequential": (
        lambda: nn.Sequential(STACKS["DINO"].model()), {}, TypeError, "must not be a Sequential",
    ),
    "name is taken": (named_like_ours, {}, RuntimeError, "has an attribute 'gated_prompts'"),
    "batch_dim of CLIP": ("CLIP", {}, ValueError, r"must be 1 .* got 0"),
    "batch_dim of torchvision": ("torchvision", {"batch_dim": 1}, ValueError, "must be 0 .* got 1"),
    "own multihead": (own_multihead, {}, ValueError, "'self_attention' has its own forward"),
    "patched multihead": (patched_multihead, {}, ValueError, "has its own forward"),
    "part": (lambda: outer_attached().visual, {}, RuntimeError, "has gated prompts already"),

}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_attach_refuses_leaves_the_model_as_it_was(case):
    make, options, error, words = REFUSED[case]
    model = STACKS[make].model() if isinstance(make, str) else make()
    before = [p.requires_grad for p in model.parameters()], hooks_of(model), list(model.children())
    with pytest.raises(error, match=f"(attach|PromptTokens): .*{words}"):
        gp.attach(model, **options)
    now = [p.requires_grad for p in model.parameters()], hooks_of(model), list(model.children())
    assert now == before


def test_a_query_that_no_block_calls_is_told():
    model = STACKS["own"].model()
    for layer in model.encoder.layers:
        layer.unused = nn.Linear(16, 16)
    gp.attach(model, num_prompts=3, blocks="encoder.layers", query="unused").double()
    with pytest.raises(RuntimeError, match="attention of block 0 has not divided its queries"):
        model(images())


def test_blocks_that_change_the_tokens_are_told():
    class Halving(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(16, 16)

        def forward(self, x):
            return x[:, ::2]

    model = STACKS["own"].model()
    model.encoder.layers[1] = Halving().double()
    gp.attach(model, "vpt-shallow", num_prompts=3, blocks="encoder.layers").double()
    with pytest.raises(ValueError, match="attach: block 1 must keep the shape of its input"):
        model(images())
    model = STACKS["DINO"].model()
    gp.attach(model, num_prompts=3).double()
    with pytest.raises(TypeError, match=r"output of Block must be tokens \[B, N, D\], got \[3, 2"):
        model.blocks[0](model.prepare_tokens(images()), return_attention=True)


def test_sizes_that_do_not_fit_are_told():
    model = gp.attach(STACKS["DINO"].model(), num_prompts=3, start=6).double()
    with pytest.raises(ValueError, match="start must be at most the number of tokens, 5, got 6"):
        model(images())
    model = attached("DINO")
    model.blocks[0].attn.qkv = nn.Linear(16, 32).double()  # grouped queries
    with pytest.raises(ValueError, match=r"'attn.qkv' of block 0 must map D to D .* got 16 to 32"):
        model(images())


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = STACKS["own"].model()

    def forward(self, images):
        x = self.inner.patch_embed(images).transpose(0, 1)
        for layer in self.inner.encoder.layers:
            x = layer(x.transpose(0, 1)).transpose(0, 1) if layer is None else layer(x)
        return self.inner.classifier(x.mean(0))


def test_a_wrong_batch_dim_is_told_in_the_first_forward():
    options = {"blocks": "inner.encoder.layers", "temperature": False, "head": False}
    model = gp.attach(SequenceFirst(), "vpt-shallow", num_prompts=3, **options).double()
    with pytest.raises(ValueError, match=r"first block got \[4, 3, 16\].*batch_dim=0 must be"):
        model(images())


def replace_first(model):
    model.blocks[0] = copy.deepcopy(STACKS["DINO"].model().blocks[0])


def replace_last(model):
    model.blocks[2] = copy.deepcopy(STACKS["DINO"].model().blocks[2])


def shorten(model):
    model.blocks = model.blocks[:2]


def swap(model):
    model.blocks = nn.ModuleList([model.blocks[i] for i in (0, 2, 1)])


def run_twice(model):
    model.blocks = nn.ModuleList([block for block in model.blocks for _ in range(2)])


def drop_a_token(model):
    forward = model.blocks[1].forward
    model.blocks[0].register_forward_hook(lambda m, args, out: out[:, 1:])
    return forward


@pytest.mark.parametrize(
    "change", [replace_first, replace_last, shorten, swap, run_twice, drop_a_token]
)
def test_blocks_that_do_not_run_one_after_the_other_are_told(change):
    model, x = attached("DINO"), images()
    wanted = model(x)
    change(model)
    with pytest.raises(
        RuntimeError, match=r"attach: (blocks must run one|the forward of Dino ran)"
    ):
        model(x)
    other = attached("DINO")
    broken = other.blocks[1].forward
    other.blocks[1].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        other(x)
    other.blocks[1].forward = broken
    assert torch.equal(other(x), wanted)  # nothing is left of the forward that failed


def test_a_forward_without_images_is_not_about_the_prompts():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.text = STACKS["DINO"].model(), nn.Linear(4, 4).double()

        def forward(self, images=None, text=None):
            return self.text(text) if images is None else self.visual(images)

    model = gp.attach(Pair(), num_prompts=3, blocks="visual.blocks", head=False).double()
    assert model(text=torch.ones(2, 4).double()).shape == (2, 4)
    assert model(images()).shape == (3, 4)
    model.visual.blocks = nn.ModuleList()
    with pytest.raises(RuntimeError, match="the forward of Pair ran 0 of 3 blocks"):
        model(images())


def test_threads_share_a_model():
    model, x = attached("DINO"), images()
    with torch.no_grad():
        wanted = model(x)

        def run(_):
            with torch.no_grad():
                return all(torch.equal(model(x), wanted) for _ in range(30))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(4)))


def test_a_detached_multihead_attention_is_as_before_under_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = attached("torchvision"), images()
    wanted = model(x)
    attention = model.encoder.layers[1].self_attention
    hooks.add_hook_to_module(attention, hooks.ModelHook())
    assert torch.equal(model(x), wanted)
    gp.detach(model)
    without = model(x)
    hooks.remove_hook_from_module(attention)
    assert torch.equal(model(x), without)
    assert not (without - wanted).abs().max() < 1e-6


def test_two_models_of_transformers_may_share_a_config():
    transformers = pytest.importorskip("transformers")
    first = STACKS["HF ViT"].model()
    second = transformers.ViTForImageClassification(first.config)
    gp.attach(first, num_prompts=3, rule="residual")
    assert not hasattr(second.config, "gated_prompts")
    assert first.config.gated_prompts["rule"] == "residual"


@pytest.mark.parametrize("change", [{"need_weights": True}, {"attn_mask": torch.zeros(8, 8)}])
def test_calls_of_multihead_attention_that_have_no_temperature_are_told(change):
    model = attached("CLIP")
    attn = model.transformer.resblocks[0].attn
    x = torch.randn(8, 3, 16, dtype=torch.float64)
    assert attn(x, x, x, need_weights=False)[0].shape == x.shape
    with pytest.raises(RuntimeError, match="must be called as self-attention"):
        attn(x, x, x, **{"need_weights": False, **change})
    with pytest.raises(RuntimeError, match="must be called as self-attention"):
        attn(x, x.clone(), x, need_weights=False)


def test_data_parallel_is_refused():
    model = attached("DINO")
    replicate = model.gated_prompts._replicate_for_data_parallel  # nn.DataParallel refuses CPUs
    with pytest.raises(RuntimeError, match=r"attach: nn\.DataParallel can't copy the hooks"):
        replicate()


def test_outputs_that_somebody_keeps_stay_as_they_are():
    """A hook that keeps a block's output sees what the block returned, before the gate."""
    model, kept = attached("torchvision"), []
    block = model.encoder.layers[0]
    handle = block.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
    block._forward_hooks.move_to_end(handle.id, last=False)  # before ours
    model(images())
    assert torch.equal(*kept[0])
    handle.remove()
    block.forward = lambda x, f=block.forward: kept.append(f(x)) or kept[-1]
    before = kept and model(images())
    assert (kept[-1] - before.new_zeros(())).abs().max() > 0


@pytest.mark.parametrize("name", ["torchvision", "DINO", "CLIP"])
def test_a_sharded_model_steps_as_the_whole_one(name):
    """FSDP2 in one process: each block is a group, the rest of the model is another one."""
    from torch.distributed.fsdp import fully_shard

    x, labels = images(dtype=torch.float32), torch.arange(3)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        ends = []
        for sharded in (False, True):
            model = attached(name, "gpt", torch.float32)
            if sharded:
                mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
                for block in model.get_submodule(STACKS[name].blocks):
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            tuned = {n: p for n, p in model.named_parameters() if p.requires_grad}
            optimizer = torch.optim.SGD(tuned.values(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(logits(model, x), labels).backward()
                gp.check(model, optimizer)
                optimizer.step()
            whole = {n: p.full_tensor() if sharded else p for n, p in tuned.items()}
            ends.append({name: tensor.detach().clone() for name, tensor in whole.items()})
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def test_the_head_is_left_as_the_script_has_it():
    """Trainable, or frozen together with the rest; head=False: no head."""
    for change, trainable in (
        (lambda m: None, True),
        (lambda m: m.requires_grad_(False), False),
        (lambda m: m.requires_grad_(False).head.requires_grad_(True), True),
    ):
        model = STACKS["DINO"].model()
        change(model)
        gp.attach(model, num_prompts=3)
        assert {p.requires_grad for p in model.head.parameters()} == {trainable}
        assert not any(p.requires_grad for p in model.blocks.parameters())
    model = gp.attach(STACKS["DINO"].model(), num_prompts=3, head=False)
    tuned = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith("gated_prompts.") for name in tuned)
    model = STACKS["DINO"].model()
    model.to_logits = model.head
    del model.head
    with pytest.warns(UserWarning, match="attach: found no head in Dino"):
        gp.attach(model, num_prompts=3)


def test_dropout_that_stays_active_is_told():
    model = STACKS["DINO"].model()
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.attach(model, num_prompts=3)
    gp.detach(model)
    model.blocks[0].mlp.append(nn.Dropout(0.25))
    with pytest.warns(UserWarning, match=r"attach: Dropout \(0\.25\) stays active in train mode"):
        gp.attach(model, num_prompts=3)


def test_models_that_make_feature_maps_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    with pytest.raises(TypeError, match="Dinov2Backbone makes feature maps of hidden states"):
        gp.attach(transformers.Dinov2Backbone(config), num_prompts=3)
