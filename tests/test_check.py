# SPDX-License-Identifier: Apache-2.0
"""What would not be tuned is said: by a warning, by `save_tuned` or by `check`.

The cases are what public training scripts do around the model.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from stacks import SIDE, logits
from test_attach import attached, images
from torch import nn

import gated_prompt as gp

timm_or_skip()
from timm.models.vision_transformer import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 4, **changes}).double()


def wrapped(method="gpt", **options):
    return gp.wrap(vit(), method, num_prompts=3, **options)


MODELS = {"wrap": wrapped, "attach": lambda: attached("DINO")}
LABELS = torch.tensor([0, 1, 2])


def freeze_all_but_the_classifier(model):
    """As accelerate's cv_example, MAE's main_linprobe and DINO's eval_linear do."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def warnings_of(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in found if "gated_prompt" not in str(w.category)]


@pytest.mark.parametrize("kind", MODELS)
def test_frozen_prompts_are_told_of_once_and_only_in_training(kind):
    model, x = MODELS[kind](), images()
    assert warnings_of(lambda: model.train()(x)) == []
    model = MODELS[kind]()
    freeze_all_but_the_classifier(model)
    assert warnings_of(lambda: model.eval()(x)) == []
    with torch.no_grad():
        assert warnings_of(lambda: model.train()(x)) == []
    (told,) = warnings_of(lambda: model.train()(x))
    assert "parameters of prompts, gates and temperatures are frozen" in told
    assert "'prompts.tokens'" in told
    assert "before wrap or attach" in told
    assert warnings_of(lambda: model(x)) == []


@pytest.mark.parametrize("kind", MODELS)
def test_no_grad_around_a_model_in_train_mode_is_told(kind):
    model, x = MODELS[kind](), images()
    with torch.no_grad():
        assert warnings_of(lambda: model.eval()(x)) == []
        (told,) = warnings_of(lambda: model.train()(x))
        assert warnings_of(lambda: model(x)) == []
    assert "in train mode runs under torch.no_grad" in told


@pytest.mark.parametrize("method", ["linear", "full", "bias", "partial-1"])
def test_methods_without_prompts_have_nothing_to_tell(method):
    model, x = wrapped(method).train(), images()
    assert warnings_of(lambda: model(x)) == []
    with torch.no_grad():
        assert warnings_of(lambda: model(x)) == []


def problems_of(model, optimizer, run=None):
    loss = F.cross_entropy((run or (lambda: logits(model, images())))(), LABELS)
    if loss.requires_grad:
        loss.backward()
    with pytest.raises(RuntimeError, match=r"^check: ") as error:
        gp.check(model, optimizer)
    return str(error.value)


@pytest.mark.parametrize("kind", MODELS)
def test_check_is_silent_if_all_is_well(kind):
    model = MODELS[kind]().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="check: no parameter has a gradient"):
        gp.check(model, optimizer)
    F.cross_entropy(logits(model, images()), LABELS).backward()
    gp.check(model, optimizer)
    gp.check(nn.ModuleDict({"inner": model}), [optimizer])
    words = gp.check(torch.compile(model), optimizer)
    assert words.startswith("tuned: 6 parameters of prompts, gates and temperatures, and ")
    assert "head; frozen: " in words
    frozen = sum(not p.requires_grad for p in model.parameters())
    assert words.endswith(f"frozen: {frozen} parameters")
    decayed = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.warns(UserWarning, match=r"check: gates.0.logit, gates.1.logit, temperatures\.0, "):
        gp.check(model, decayed)
    groups = model.param_groups(0.1, 0.1) if kind == "wrap" else gp.param_groups(model, 0.1, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.check(model, torch.optim.AdamW(groups))
    with pytest.raises(TypeError, match=r"check: optimizer must be a torch\.optim\.Optimizer"):
        gp.check(model, torch.optim.lr_scheduler.StepLR(decayed, 1))
    with pytest.raises(RuntimeError, match=r"are in nn\.DataParallel"):
        gp.check(nn.DataParallel(model))


@pytest.mark.parametrize("kind", MODELS)
def test_check_finds_what_the_scripts_do(kind):
    model = MODELS[kind]().train()
    # an optimiser that the script made before wrap or attach
    old = torch.optim.SGD(copy.deepcopy(model).head.parameters(), lr=0.1)
    words = problems_of(model, old)
    assert "are in no group of the optimizer" in words
    assert "prompts.tokens" in words
    # only the head
    assert "no group" in problems_of(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    # two optimisers with the same parameters
    tuned = [p for p in model.parameters() if p.requires_grad]
    both = [torch.optim.SGD(tuned, lr=0.1), torch.optim.Adam(model.head.parameters())]
    words = problems_of(model, both)
    assert "2 tuned parameters (" in words
    assert "are in several groups" in words
    # frozen by the script
    freeze_all_but_the_classifier(model)
    model.zero_grad()
    words = problems_of(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    assert "are frozen" in words
    assert "gradient" not in words


@pytest.mark.parametrize("kind", MODELS)
def test_check_finds_a_no_grad_around_the_backbone(kind):
    """As MoCo v3 and DINO evaluate linear probes: features under no_grad, a classifier outside."""
    model, classifier = MODELS[kind]().eval(), nn.Linear(16, 4).double()
    model.head = nn.Identity()

    def run():
        with torch.no_grad():
            features = logits(model, images())
        return classifier(features)

    tuned = [*(p for p in model.parameters() if p.requires_grad), *classifier.parameters()]
    words = problems_of(model, torch.optim.SGD(tuned, lr=0.1), run)
    assert "have no gradient after backward" in words
    assert "temperatures.0" in words


def test_check_finds_prompts_that_peft_has_copied():
    """modules_to_save=["gated_prompts"] trains a copy, and the hooks use the original."""
    model = attached("DINO")
    original = model.gated_prompts
    model.gated_prompts = nn.Module()
    model.gated_prompts.original_module = original
    model.gated_prompts.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
    with pytest.raises(RuntimeError, match="are copies by PEFT's modules_to_save"):
        gp.check(model)


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_that_never_change_are_told(kind):
    """The script's optimiser was made before wrap or attach."""
    model, x = MODELS[kind]().train(), images()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)

    def step(optimizer=optimizer):
        optimizer.zero_grad()
        F.cross_entropy(logits(model, x), LABELS).backward()
        optimizer.step()

    assert warnings_of(lambda: [step() for _ in range(100)]) == []
    (told,) = warnings_of(step)
    assert "have not changed in 100 forwards in train mode" in told
    assert warnings_of(lambda: [step() for _ in range(101)]) == []
    model = MODELS[kind]().train()
    tuned = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert warnings_of(lambda: [step(tuned) for _ in range(102)]) == []


def test_forwards_that_are_not_the_models_are_told_too():
    """DINO's eval_linear calls get_intermediate_layers; the prompts follow the classifier."""
    model = attached("DINO")
    classifier = nn.Linear(16, 4).double()
    classifier.gated_prompts = model.gated_prompts
    model.eval()
    classifier.train()
    with torch.no_grad():
        (told,) = warnings_of(lambda: model.get_intermediate_layers(images()))
    assert "in train mode runs under torch.no_grad" in told


def test_a_bare_backbones_state_is_not_loaded_into_a_wrapped_model():
    """With strict=False, as MoCo v3 and MAE load, nothing would be loaded."""
    model, state = wrapped(), vit().state_dict()
    with pytest.raises(RuntimeError, match="load it before wrap, or into model"):
        model.load_state_dict(state, strict=False)
    outer = nn.ModuleDict({"module": model})
    with pytest.raises(RuntimeError, match="load it before wrap, or into model"):
        outer.load_state_dict({f"module.{n}": t for n, t in state.items()}, strict=False)
    model.load_state_dict(model.state_dict())
    model.backbone.load_state_dict({**model.backbone.state_dict(), **state})


def test_saving_an_attached_model_says_how(tmp_path):
    with pytest.raises(TypeError, match="got one with prompts from attach; save its state_dict"):
        gp.save_tuned(attached("DINO"), tmp_path)


def test_check_wants_gated_prompts():
    with pytest.raises(TypeError, match="check: model must contain what wrap or attach returned"):
        gp.check(vit())


def test_what_was_never_tuned_is_not_saved(tmp_path):
    model = wrapped()
    freeze_all_but_the_classifier(model)
    with pytest.raises(RuntimeError, match=r"save_tuned: .* are frozen, so they were never tuned"):
        model.save_tuned(tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()
    gp.tuned_state_dict(model)
    model = wrapped()
    with pytest.warns(UserWarning, match="save_tuned: .* nothing has tuned them"):
        model.save_tuned(tmp_path / "untouched")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped("linear").save_tuned(tmp_path / "linear")
        with torch.no_grad():
            model.prompts.tokens.add_(0.1)
        model.save_tuned(tmp_path / "tuned")
        loaded = gp.load_tuned(tmp_path / "tuned", vit())
        loaded.requires_grad_(False).save_tuned(tmp_path / "again")  # frozen for inference
        ema = copy.deepcopy(model).requires_grad_(False)  # as timm's ModelEmaV3
        ema.save_tuned(tmp_path / "ema")


DROPS = {
    "drop_rate": (0.1, r"Dropout \(0\.1\)"),
    "attn_drop_rate": (0.2, r"Dropout \(0\.2\)"),
    "drop_path_rate": (0.3, r"DropPath \(0\.\d+\)"),
    "patch_drop_rate": (0.4, r"PatchDropout\w* \(0\.4\)"),
}


@pytest.mark.parametrize("option", DROPS)
@pytest.mark.parametrize("method", ["linear", "gpt", "partial-1", "bias", "full"])
def test_dropout_of_a_frozen_backbone_is_told(method, option):
    rate, pattern = DROPS[option]
    backbone = vit(**{option: rate}).train()
    if method in ("bias", "full"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gp.wrap(backbone, method).training
        return
    with pytest.warns(UserWarning, match=rf"wrap: .*{pattern}.* has no effect"):
        model = gp.wrap(backbone, method, num_prompts=3)
    assert model.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.wrap(vit(**{option: 0.0}), method, num_prompts=3)


def test_the_first_loss_of_a_new_head_is_near_that_of_chance():
    """For features as a final LayerNorm gives them. VPT's initialisation is far from it."""
    labels = torch.arange(64) % 10
    torch.manual_seed(1)
    x = torch.randn(64, 3, SIDE, SIDE, dtype=torch.float64)
    losses = {}
    for head in ("new", "vpt"):
        sizes = {"embed_dim": 192, "num_heads": 3, "num_classes": 10}
        model = gp.wrap(vit(**sizes), num_prompts=3, head=head).eval()
        losses[head] = F.cross_entropy(model(x), labels).item()
    assert abs(losses["new"] - torch.tensor(10.0).log().item()) < 0.1
    assert losses["vpt"] > 1.5 * losses["new"]


def test_heads_are_new_kept_or_given(tmp_path):
    backbone = vit()
    backbone.head = nn.Sequential(nn.BatchNorm1d(16, affine=False, eps=1e-6), nn.Linear(16, 4))
    backbone.head.double().requires_grad_(False)
    kept = gp.wrap(backbone, num_prompts=3, head="keep").train()
    assert kept.head is not backbone.head
    assert torch.equal(kept.head[1].weight, backbone.head[1].weight)
    assert kept.num_classes == 4
    assert {"head.1.weight", "head.1.bias"} <= kept.tuned_parameters().keys()
    kept(images())
    assert kept.head[0].running_mean.any()
    assert not backbone.head[0].running_mean.any()
    assert gp.unwrap(kept) is backbone
    with pytest.warns(UserWarning, match=r"vit\.head is a Sequential, which is not used"):
        gp.unwrap(gp.wrap(backbone, num_prompts=3))
    given = nn.Linear(16, 7).double()
    model = gp.wrap(backbone, num_prompts=3, head=given)
    assert model.head is given
    assert model(images()).shape == (3, 7)
    model.reset_classifier(5)
    assert not model.head.bias.any()
    assert model.head.weight.std() < 0.02
    gp.unwrap(model)
    model = gp.wrap(backbone, num_prompts=3, head="vpt")
    model.reset_classifier(9)
    assert torch.allclose(model.head.bias, torch.full((9,), -4.59512, dtype=torch.float64))
    gp.unwrap(model)
    with pytest.raises(ValueError, match="wrap: head must not share parameters with vit"):
        gp.wrap(backbone, head=backbone.head)
    with pytest.raises(ValueError, match="wrap: head must be 'new', 'vpt', 'keep' or a module"):
        gp.wrap(backbone, head="old")
    gp.wrap(vit(), num_prompts=3, head="keep").save_tuned(tmp_path)
    assert gp.load_tuned(tmp_path, vit()).num_classes == 4


def test_a_model_is_wrapped_or_attached_and_not_both():
    backbone = vit()
    model = gp.wrap(backbone, num_prompts=3)
    for part in (model, backbone):
        with pytest.raises(RuntimeError, match="attach: model has gated prompts already"):
            gp.attach(part, num_prompts=3)
    gp.attach(gp.unwrap(model), num_prompts=3)
    with pytest.raises(RuntimeError, match="wrap: vit has gated prompts from attach"):
        gp.wrap(backbone, num_prompts=3)
    gp.wrap(gp.detach(backbone), num_prompts=3)


def test_wrap_says_what_to_do_with_models_of_others():
    class Holder(nn.Module):
        def __init__(self, name):
            super().__init__()
            setattr(self, name, vit())

    for name in ("timm_model", "trunk"):
        with pytest.raises(TypeError, match=rf"wrap model\.{name}: model\.{name} = gp\.wrap"):
            gp.wrap(Holder(name))
    with pytest.raises(TypeError, match=r"got torch.*Linear; gp\.attach is for other models"):
        gp.wrap(nn.Linear(2, 2))
    from stacks import mae

    with pytest.raises(TypeError, match=r"wrap: vit must have the forward\w* .* gp\.attach keeps"):
        gp.wrap(mae())
    with pytest.raises(TypeError, match=r"wrap: vit must have the forward\w* .* gp\.attach keeps"):
        gp.wrap(mae(global_pool=True))
