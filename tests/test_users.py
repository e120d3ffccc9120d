# SPDX-License-Identifier: Apache-2.0
"""What users do with a wrapped model besides training it: count, trace, average, save, copy."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gated_prompt as gp

timm = timm_or_skip()
from restated import make_case, small_eva, small_vit, tuned
from timm.data import resolve_model_data_config

from gated_prompt.job.tune import evaluate
from gated_prompt.vit.checkpoint_file import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTED = ["vpt-shallow", "vpt-deep", "gpt", "gpt-deep"]


def images(batch=2, **options):
    torch.manual_seed(3)
    return torch.randn(batch, 3, 40, 24, **{"dtype": torch.float64, **options})


# ---- traces, vmap, FLOP counts, empty batches, export, second derivatives ----


@pytest.mark.parametrize("method", PROMPTED)
@pytest.mark.parametrize("vit", ["MAE-style", "DINOv3-style"])
def test_jit_and_symbolic_traces_have_gates_and_temperatures(vit, method):
    model = make_case(vit, {"method": method}).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace makes constants of Python values
        traced = [torch.jit.trace(model, images())]
        if vit == "MAE-style":  # the other one's rotary embedding needs a real image size
            traced.append(torch.fx.symbolic_trace(model))
        x = images() + 1
        for each in traced:
            torch.testing.assert_close(each(x), model(x))
        if method != "vpt-shallow":
            changed = model.deep_prompts.tokens if method == "vpt-deep" else model.gates[0].logit
            changed.add_(1.0)
            torch.testing.assert_close(traced[0](x), model(x))


@pytest.mark.parametrize("method", PROMPTED)
def test_a_trace_is_the_same_with_gradients_and_without(method):
    model = make_case("MAE-style", {"method": method}).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images())  # traces again, without gradients, and compares
    torch.testing.assert_close(traced(images() + 1), model(images() + 1))


def test_the_old_onnx_export_takes_no_writes_to_slices(monkeypatch):
    h, x, logit = torch.randn(1, 6, 4), torch.randn(1, 6, 4), torch.zeros(1)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(lambda h: gp.prompt_gate(h, x, logit, 1, 2), h).graph
        with pytest.raises(RuntimeError, match=r"leaves writes to slices out .* or prompt_gate "):
            torch.jit.trace(lambda h: gp.prompt_gate_(h, x, logit, 1, 2), h)
    assert not {"aten::slice_scatter", "aten::copy_"} & {node.kind() for node in graph.nodes()}
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        kinds = {node.kind() for node in torch.jit.trace(model, images()).inlined_graph.nodes()}
    assert not {"aten::slice_scatter", "aten::copy_"} & kinds
    assert "aten::sigmoid" in kinds


def test_an_ensemble_of_gates_by_vmap():
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    logits = torch.randn(4, 1)
    x = images()

    def run(logit):
        return torch.func.functional_call(model, {"gates.0.logit": logit}, (x,))

    wanted = torch.stack([run(logit) for logit in logits])
    torch.testing.assert_close(torch.func.vmap(run)(logits), wanted)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4


@pytest.mark.parametrize("method", PROMPTED)
def test_flop_are_counted_without_gradients(method):
    model = make_case("MAE-style", {"method": method}).eval()
    counts = []
    for context in (torch.enable_grad, torch.no_grad):
        with context(), FlopCounterMode(display=False) as counter:
            model(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("method", ["linear", *PROMPTED])
@pytest.mark.parametrize("make", [small_vit, small_eva])
def test_an_empty_batch_has_empty_results_and_zero_gradients(make, method):
    if method == "linear" and make is small_eva:
        pytest.skip("timm's Eva attention does not take an empty batch")
    model = gp.wrap(make(), method, num_prompts=4)
    logits = model(images(0))
    assert logits.shape == (0, 5)
    gradients = torch.autograd.grad(logits.sum(), list(tuned(model).values()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("method", PROMPTED)
def test_an_exported_model_takes_any_batch(method):
    model = make_case("MAE-style", {"method": method, "attention": "math"}).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        torch.testing.assert_close(exported(images(size)), model(images(size)))


def test_a_second_derivative_says_what_has_one():
    model = make_case("MAE-style", {"method": "gpt", "attention": "math"})
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use torch.func .*, which also works with a model"):
        gradient.square().sum().backward()
    found = torch.func.grad(lambda x: torch.func.grad(lambda y: model(y).sum())(x).square().sum())
    assert found(x.detach()).abs().max() > 0


# ---- state ----


@pytest.mark.parametrize("method", ["linear", *PROMPTED])
def test_there_is_no_state_but_parameters(method):
    model = gp.wrap(small_vit(), method, num_prompts=4, gated_blocks=1 if "gpt" in method else None)
    assert not list(model.buffers())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    x = images()
    torch.testing.assert_close(average.eval()(x), model.eval()(x))
    other = gp.wrap(small_vit(), **vars(model.options)).to("meta").to_empty(device="cpu").eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_statistics_of_a_norm_before_the_head_are_tuned_state(tmp_path):
    def make():
        model = gp.wrap(small_vit(), "gpt", num_prompts=4, prompt_dropout=0.0)
        model.head = nn.Sequential(nn.BatchNorm1d(36, affine=False), model.head).double()
        return model

    model, other = make(), make().eval()
    for seed in range(3):
        torch.manual_seed(seed)
        model(3 * torch.randn(8, 3, 40, 24, dtype=torch.float64) + 1)
    assert model.num_classes == 5
    state = gp.tuned_state_dict(model.eval())
    assert {"head.0.running_mean", "head.0.running_var"} <= state.keys()
    gp.load_tuned_state_dict(other, state)
    assert torch.equal(other(images()), model(images()))
    with pytest.raises(ValueError, match=r"(?s)head must be as .* save tuned_state_dict\(model\)"):
        model.save_tuned(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_modules_of_the_users_have_a_group_and_are_not_saved_to_be_lost(tmp_path):
    model = gp.wrap(small_vit(), "gpt", num_prompts=4)
    model.aux = nn.Linear(36, 7)
    groups = {group["name"]: group for group in model.param_groups(lr=0.1, weight_decay=0.01)}
    assert groups["aux"]["params"] == list(model.aux.parameters())
    assert groups["aux"]["lr"] == 0.1
    assert {"aux.weight", "aux.bias"} <= gp.tuned_state_dict(model).keys()
    with pytest.raises(ValueError, match=r"shape: 'aux.weight', 'aux.bias'; load_tuned could"):
        model.save_tuned(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_statistics_inside_the_backbone_are_tuned_state():
    class Adapter(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp, self.norm = mlp, nn.BatchNorm1d(36, affine=False).double()

        def forward(self, x):
            return self.mlp(x) + self.norm(x.flatten(0, 1)).view_as(x)

    def make():
        vit = small_vit()
        vit.blocks[1].mlp = Adapter(vit.blocks[1].mlp)
        return gp.wrap(vit, "gpt", num_prompts=4)

    model, other = make(), make().eval()
    model.blocks[1].mlp.norm.train()
    model(images())
    gp.load_tuned_state_dict(other, gp.tuned_state_dict(model.eval()))
    assert torch.equal(other(images()), model(images()))


def test_gates_and_temperatures_do_not_decay():
    model = gp.wrap(small_vit(), "gpt", num_prompts=4)
    groups = {g["name"]: g["weight_decay"] for g in model.param_groups(lr=0.1, weight_decay=0.01)}
    assert groups == {"prompts": 0.01, "gates": 0.0, "temperatures": 0.0, "head": 0.01}


# ---- the backbone's attributes and methods ----


def test_the_backbones_own_is_passed_on():
    vit = small_vit()
    vit.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4,) * 3, "crop_pct": 0.7}
    wanted = resolve_model_data_config(vit)
    model = gp.wrap(vit, "gpt", num_prompts=4)
    assert resolve_model_data_config(model) == wanted
    assert wanted["mean"] == (0.1, 0.2, 0.3)
    assert len(model.blocks) == 3
    assert model.patch_embed is vit.patch_embed
    assert copy.deepcopy(model).pretrained_cfg == vit.pretrained_cfg
    with pytest.raises(AttributeError, match="'GatedPromptViT' object has no attribute 'blokcs'"):
        model.blokcs  # noqa: B018
    assert not hasattr(model, "_hf_hook")


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("method", ["linear", *PROMPTED])
@pytest.mark.parametrize("make", [small_vit, small_eva])
def test_intermediates_are_what_follows_the_blocks(make, method, position):
    model = gp.wrap(make(), method, num_prompts=4, prompt_position=position).eval()
    x = images()
    final, found = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    assert torch.equal(final, model.forward_features(x))
    prompts = 0 if method == "linear" else 4
    at_start = position == "start"
    first = 1 + (prompts if at_start else 0)
    patches, prefix = found[-1]
    assert torch.equal(prefix, final[:, :first])
    assert torch.equal(patches, final[:, first : first + 15])
    if method == "linear":  # equals timm's own method
        wanted = model.backbone.forward_intermediates(x, intermediates_only=True, norm=True)
        got = model.forward_intermediates(x, intermediates_only=True, norm=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
            assert a.shape == (2, a.shape[1], 5, 3)
    kept, inputs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    one = model.forward_intermediates(x, [1], stop_early=True, output_fmt="NLC")[1]
    assert len(inputs) == 2, "the last block must not run"
    model(x)
    kept.append(inputs[-1][:, first : first + 15])  # input of the last block: output of block 1
    torch.testing.assert_close(one[0], kept[0])
    last_two = model.get_intermediate_layers(x, 2)
    assert [t.shape[1] for t in last_two] == [15, 15]
    torch.testing.assert_close(last_two[0], kept[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    for indices in (0, 4, [3], [-4]):
        with pytest.raises(ValueError, match="forward_intermediates: indices must be in"):
            model.forward_intermediates(x, indices)


def test_a_pool_with_the_class_token_in_it_is_asked_for():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, global_pool="avg", pool_include_prefix=True
    )
    with pytest.raises(ValueError, match=r"pool must be one of .* pool_include_prefix=True"):
        gp.wrap(vit, "linear")
    assert gp.wrap(vit, "linear", pool="patch").pool == "patch"


def test_dropout_before_the_head_is_the_backbones():
    model = gp.wrap(small_vit(drop_rate=0.5), "full").train()
    tokens = torch.ones(1, 16, 36, dtype=torch.float64)
    features = model.forward_head(tokens, pre_logits=True)
    assert (features == 0).any()
    assert not (model.eval().forward_head(tokens, pre_logits=True) == 0).any()


@pytest.mark.parametrize("name", ["forward_features", "forward_head", "pool", "forward"])
def test_methods_of_the_backbone_that_would_not_run_are_refused(name):
    vit = small_vit()
    setattr(vit, name, getattr(vit, name))
    with pytest.raises(RuntimeError, match=f"vit .* has its own {name}, which would not run"):
        gp.wrap(vit)
    assert all(p.requires_grad for p in vit.parameters())
    if name != "forward":
        model = gp.wrap(small_vit())
        setattr(model.backbone, name, getattr(model.backbone, name))
        with pytest.raises(RuntimeError, match=f"has its own {name}, which would not run"):
            model(images())


# ---- copies, and parts that were replaced after wrap ----


def test_a_copy_of_a_wrapped_backbone_and_a_lost_one_can_be_wrapped():
    vit = small_vit()
    wanted = vit(images())
    model = gp.wrap(vit, "gpt", num_prompts=4, temperature=0.5)
    teacher = copy.deepcopy(model.backbone)
    with pytest.raises(RuntimeError, match=r"vit is wrapped already; call unwrap\(vit\) first"):
        gp.wrap(vit)
    other = gp.wrap(teacher, "linear")
    assert torch.equal(gp.unwrap(other)(images()), wanted)
    del model  # as a notebook cell that runs again does
    model = gp.wrap(vit, "gpt", num_prompts=2)
    assert torch.equal(gp.unwrap(vit)(images()), wanted)
    assert all(p.requires_grad for p in vit.parameters())
    with pytest.raises(RuntimeError, match="this wrapper was unwrapped"):
        model(images())


def test_flags_are_given_back_to_parameters_that_were_exchanged():
    vit = small_vit()
    vit.pos_embed.requires_grad_(False)
    model = gp.wrap(vit, "gpt", num_prompts=4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    flags = {name: p.requires_grad for name, p in gp.unwrap(model).named_parameters()}
    assert flags.pop("pos_embed") is False
    assert all(flags.values())


def test_weights_that_are_loaded_into_a_narrowed_model_stay():
    vit, new = small_vit().float(), small_vit().float()
    nn.init.normal_(new.blocks[0].mlp.fc1.weight)
    model = gp.wrap(vit, "vpt-shallow", num_prompts=4, frozen_dtype=torch.bfloat16)
    own = vit.blocks[1].mlp.fc1.weight.dtype, new.blocks[0].mlp.fc1.weight
    changed = {"backbone.blocks.0.mlp.fc1.weight": own[1]}
    model.load_state_dict(model.state_dict() | changed)
    gp.unwrap(model)
    assert own[0] == torch.bfloat16
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, own[1].bfloat16().float())
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, new.blocks[1].mlp.fc1.weight)


def test_names_are_those_of_the_model_that_is_not_compiled(tmp_path):
    vit = small_vit()
    wanted = vit(images())
    model = gp.wrap(vit, "partial-1", prompt_dropout=0.0)
    names = list(model.tuned_parameters())
    for index in range(3):
        model.blocks[index] = torch.compile(model.blocks[index], backend="eager")
    assert list(model.tuned_parameters()) == names
    model.save_tuned(tmp_path)
    again = gp.load_tuned(tmp_path, small_vit())
    torch.testing.assert_close(again(images()), model.eval()(images()))
    torch.testing.assert_close(gp.unwrap(model)(images()), wanted)


def test_adapters_that_are_frozen_by_wrap_are_named():
    vit = small_vit().requires_grad_(False)
    vit.blocks[0].mlp = nn.Sequential(vit.blocks[0].mlp, nn.Linear(36, 36).double())
    with pytest.warns(UserWarning, match=r"2 parameters of vit .* 'blocks.0.mlp.1.weight'"):
        gp.unwrap(gp.wrap(vit, num_prompts=2))
    assert vit.blocks[0].mlp[1].weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.wrap(small_vit().requires_grad_(False), num_prompts=2)


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["linear", *PROMPTED])
def test_what_is_tuned_beside_a_narrow_backbone_is_float32(method, dtype):
    model = gp.wrap(small_vit().to(dtype), method, num_prompts=4, prompt_dropout=0.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = {n: p.dtype for n, p in tuned(model).items()}
    assert {d for n, d in found.items() if not n.startswith(("gates", "temp"))} == {wide}
    assert torch.float16 not in found.values()
    assert torch.bfloat16 not in found.values()
    logits = model(images(dtype=dtype))
    assert logits.dtype == wide
    logits.sum().backward()
    before = model.head.bias.detach().clone()
    optimizer = torch.optim.AdamW(model.param_groups(lr=1e-4))
    optimizer.step()
    assert (model.head.bias != before).all()


def test_a_narrow_backbone_that_is_tuned_itself_is_warned_of():
    with pytest.warns(UserWarning, match=r"'bias' tunes parameters .* in torch.bfloat16"):
        gp.wrap(small_vit().bfloat16(), "bias")


def test_frozen_dtype_outside_autocast_says_so():
    model = gp.wrap(small_vit().float(), num_prompts=4, frozen_dtype=torch.bfloat16)
    x = images(dtype=torch.float32)
    data = torch.utils.data.TensorDataset(x, torch.zeros(2, dtype=torch.long))
    for call in (
        lambda: model(x),
        lambda: model.forward_features(x),
        lambda: evaluate(model, data),
    ):
        with pytest.raises(RuntimeError, match=r"frozen_dtype=torch.bfloat16 needs torch.autocast"):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(RuntimeError, match=r"needs torch.autocast\('cpu', torch.bfloat16\)"),
    ):
        model(x)
    started = gp.wrap(
        small_vit().float(), num_prompts=4, frozen_dtype=torch.bfloat16, prompt_init="mean",
        init_images=x,
    )  # fmt: skip
    assert started.prompts.tokens.isfinite().all()


def test_an_empty_data_set_has_no_accuracy():
    with pytest.raises(ValueError, match="evaluate: dataset must have at least one image"):
        evaluate(gp.wrap(small_vit(), "linear"), [])


def test_quantised_weights_have_a_digest(tmp_path):
    """The quantised weight is a tensor that wraps other tensors, as torchao's weights do."""
    from torch.testing._internal.two_tensor import TwoTensor

    def make(number):
        vit = small_vit()
        weight = vit.blocks[0].mlp.fc1.weight.detach()
        vit.blocks[0].mlp.fc1.weight = nn.Parameter(TwoTensor(weight, weight * number))
        return vit

    model = gp.wrap(make(1), "linear")
    model.save_tuned(tmp_path)
    gp.load_tuned(tmp_path, make(1))
    with pytest.raises(CheckpointError, match="another backbone"):
        gp.load_tuned(tmp_path, make(2))


def test_a_step_of_a_model_with_everything_attached_lowers_the_loss():
    """SSF and LoRA, both by hooks, and one optimiser for everything."""
    vit = small_vit().float()
    model = gp.wrap(vit, "gpt", num_prompts=4, prompt_dropout=0.0)
    model.scale = nn.Parameter(torch.ones(36))
    model.low = nn.Parameter(0.1 * torch.randn(36, 2))
    model.high = nn.Parameter(torch.zeros(2, 108))
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda m, i, o: o * model.scale)
        block.attn.qkv.register_forward_hook(lambda m, i, o: o + i[0] @ model.low @ model.high)
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.02))
    assert {"scale", "low", "high"} <= {group["name"] for group in optimizer.param_groups}
    x, labels = images(4, dtype=torch.float32), torch.arange(4)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.high.abs().max() > 1e-3
    assert (model.scale != 1).all()


@pytest.mark.parametrize("change", ["a gate", "no gate", "weight norm"])
def test_what_could_not_be_loaded_is_not_saved(change, tmp_path):
    model = gp.wrap(small_vit(), "gpt", num_prompts=4)
    if change == "a gate":
        model.gates[0] = gp.PromptGate("channel", dim=36)
    elif change == "no gate":
        del model.gates[1]
    else:
        torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ValueError, match=r"^save_tuned: .*(; load_tuned could not|head must)"):
        model.save_tuned(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("state", [{"epoch": 3}, torch.ones(1)], ids=["dict", "tensor"])
@pytest.mark.parametrize("place", ["head", "backbone.blocks.1.mlp.fc1"])
def test_extra_state_is_refused(place, state):
    """Even a tensor: copying into it would not reach set_extra_state."""

    class Layer(nn.Linear):
        def get_extra_state(self):
            return state

    model = gp.wrap(small_vit(), "gpt", num_prompts=4)
    parent, _, name = place.rpartition(".")
    old = model.get_submodule(place)
    setattr(model.get_submodule(parent), name, Layer(old.in_features, old.out_features))
    with pytest.raises(ValueError, match=rf"and buffers, got extra state of '{place}'; save"):
        gp.tuned_state_dict(model)


def test_each_block_is_part_of_what_a_backbone_is(tmp_path):
    vit = small_vit()
    gp.wrap(vit, "linear").save_tuned(tmp_path)
    other = small_vit()
    other.blocks[1].mlp.act = nn.ReLU()
    with pytest.raises(CheckpointError, match="activation="):
        gp.load_tuned(tmp_path, other)


def test_hooks_are_not_saved_without_a_word(tmp_path):
    model = gp.wrap(small_vit(), "gpt", num_prompts=4)
    nn.init.ones_(model.prompts.tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_tuned(tmp_path)
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"'backbone.blocks.1' has a hook .* not saved"):
        model.save_tuned(tmp_path)
