# SPDX-License-Identifier: Apache-2.0
"""`load_wrapped` rebuilds a wrapped model from the whole state dict that a script has saved."""

import argparse
import copy
import json
import re
import warnings

import pytest
import torch
from conftest import timm_or_skip
from restated import OPTIONS, SAMPLE, VITS, make_case, small_vit
from safetensors.torch import save_file

import gated_prompt as gp

timm_or_skip()
pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(2, 3, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
HIDDEN = ("rule", "pool", "prompt_position", "temperature", "method")


def fresh(vit="MAE-style", **changes):
    """A backbone like that of make_case, with other weights."""
    make, own = VITS[vit]
    backbone = make(**own, **changes)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    return backbone


def hidden_of(model):
    """The options that no tensor shows. A learned temperature has tensors."""
    return {
        name: getattr(model.options, name)
        for name in HIDDEN
        if name != "temperature" or model.options.temperature is not True
    }


def loaded(source, backbone, **options):
    """load_wrapped, where a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gp.load_wrapped(source, backbone, **options)


@pytest.mark.parametrize(
    ("vit", "options"),
    [("MAE-style", options) for options in OPTIONS]
    + [(vit, options) for vit in list(VITS)[3:] for options in SAMPLE[-4:]],
    ids=str,
)
def test_loaded_models_have_identical_logits(vit, options, tmp_path):
    model = make_case(vit, options).eval()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    run = {name: getattr(model.options, name) for name in ("attention", "memory", "last_block")}
    again = loaded(tmp_path / "whole.pth", fresh(vit), **hidden_of(model), **run)
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert not again.training
    shown = ("method", "num_prompts", "gated_blocks", "temperature")
    assert all(getattr(again.options, n) == getattr(model.options, n) for n in shown)
    tuned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert tuned == [
        name for name, parameter in again.named_parameters() if parameter.requires_grad
    ]


@pytest.mark.parametrize("options", SAMPLE, ids=str)
def test_all_options_of_the_model_may_be_given(options):
    model = make_case("MAE-style", options).eval()
    again = loaded(model.state_dict(), fresh(), **vars(model.options))
    assert torch.equal(again(IMAGES), model(IMAGES))


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


CONTAINERS = {
    "state dict": lambda state: state,
    "MAE's scripts": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "timm's train.py": lambda state: {
        "epoch": 1, "arch": "x", "state_dict": state, "optimizer": {"state": {}}, "metric": 50.0,
    },
    "Lightning": lambda state: {"state_dict": with_prefix("model.", state), "epoch": 3},
    "Lightning, other tensors": lambda state: {
        "state_dict": {**with_prefix("net.", state), "criterion.weight": torch.ones(5)},
    },
    "Lightning, in a backbone": lambda state: {"state_dict": with_prefix("backbone.", state)},
    "DDP": lambda state: with_prefix("module.", state),
    "torch.compile": lambda state: with_prefix("_orig_mod.", state),
    "DDP of torch.compile": lambda state: {"model": with_prefix("module._orig_mod.", state)},
    "compiled backbone": lambda state: {
        name.replace("backbone.", "backbone._orig_mod."): value for name, value in state.items()
    },
    "compiled blocks": lambda state: {
        re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in state.items()
    },
    "TimmWrapper": lambda state: with_prefix("timm_model.", state),
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_and_prefixes(container, tmp_path):
    model = make_case("CLIP-style", {"method": "gpt-deep"}).eval()
    torch.save(CONTAINERS[container](model.state_dict()), tmp_path / "whole.pth")
    again = loaded(tmp_path / "whole.pth", fresh("CLIP-style"), **hidden_of(model))
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_safetensors_and_a_folder_of_save_pretrained(tmp_path):
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    save_file(with_prefix("timm_model.", model.state_dict()), tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", tmp_path):
        again = loaded(source, fresh(), **hidden_of(model))
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_the_ema_of_timm_is_the_default_as_in_load_backbone():
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    raw = {name: value + 1 for name, value in model.state_dict().items()}
    file = {"state_dict": raw, "state_dict_ema": model.state_dict()}
    options = hidden_of(model)
    assert torch.equal(loaded(file, fresh(), **options)(IMAGES), model(IMAGES))
    assert torch.equal(loaded(file, fresh(), which="ema", **options)(IMAGES), model(IMAGES))
    again = loaded(file, fresh(), which="raw", **options)
    assert torch.equal(again.prompts.tokens, raw["prompts.tokens"])
    with pytest.raises(ValueError, match=r"load_wrapped: which must be one of \('ema', 'raw'\)"):
        gp.load_wrapped(file, fresh(), which="teacher")


def test_the_file_decides_the_number_of_classes():
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    for classes in (0, 7):
        backbone = fresh(num_classes=classes) if classes == 0 else fresh()
        backbone.reset_classifier(classes)  # its classifier is not that of the file
        again = loaded(model.state_dict(), backbone, **hidden_of(model))
        assert again.num_classes == 5
        assert torch.equal(again(IMAGES), model(IMAGES))
    model.reset_classifier(0)
    again = loaded(model.state_dict(), fresh(), **hidden_of(model))
    assert again.num_classes == 0
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_head_of_your_own():
    head = torch.nn.Sequential(torch.nn.Linear(36, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    model.head = head.double()
    state, options = model.state_dict(), hidden_of(model)
    with pytest.raises(gp.CheckpointError, match=r"4 unexpected \('head\.0\.weight'"):
        gp.load_wrapped(state, fresh(), **options)
    again = loaded(state, fresh(), head=copy.deepcopy(head), **options)
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_the_training_mode_and_dtypes_are_those_of_wrap():
    model = make_case("MAE-style", {"method": "gpt"}).eval()
    again = loaded(model.state_dict(), fresh().float(), **hidden_of(model))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again(IMAGES.float()).double(), model(IMAGES), atol=1e-4, rtol=1e-4)


# ---- what the tensors don't show ----


@pytest.mark.parametrize(
    ("options", "given", "assumed"),
    [
        ({"method": "gpt"}, {}, "pool='cls', rule='mix', prompt_position='start'"),
        ({"method": "gpt"}, {"rule": "mix"}, "pool='cls', prompt_position='start'"),
        (
            {"method": "gpt", "temperature": False}, {"pool": "cls"},
            "rule='mix', temperature=False, prompt_position='start'",
        ),
        ({"method": "gpt", "gate": None}, {"pool": "cls"}, "prompt_position='start'"),
        (
            {"method": "vpt-shallow"}, {},
            "pool='cls', method='vpt-shallow', prompt_position='start'",
        ),
        ({"method": "vpt-deep"}, {"method": "vpt-deep", "pool": "cls"}, "prompt_position='start'"),
        ({"method": "full"}, {}, "pool='cls', method='linear'"),
        ({"method": "full"}, {"method": "full"}, "pool='cls'"),
    ],
    ids=str,
)  # fmt: skip
def test_one_warning_lists_what_was_assumed(options, given, assumed):
    state = make_case("MAE-style", options).state_dict()
    with pytest.warns(UserWarning, match="assumed") as warned:
        gp.load_wrapped(state, fresh(), **given)
    (message,) = [str(w.message) for w in warned]
    assert message.startswith(f"load_wrapped: assumed {assumed}, which the tensors don't show; ")


def test_a_constant_temperature_may_be_given_where_no_tensor_shows_a_gate():
    options = {"method": "gpt", "gated_blocks": 0, "temperature": 0.5}
    model = make_case("MAE-style", options).eval()
    with pytest.warns(UserWarning, match="assumed"):
        again = gp.load_wrapped(model.state_dict(), fresh(), temperature=0.5)
    assert again.method == "gpt"
    assert torch.equal(again(IMAGES), model(IMAGES))


# ---- errors change nothing ----


def without(state, name):
    return {n: value for n, value in state.items() if n != name}


GPT, DEEP, VPT = {"method": "gpt"}, {"method": "gpt-deep"}, {"method": "vpt-shallow"}
WRONG = [
    (GPT, {"num_prompts": 5}, r"prompts\.tokens must be \[5, 36\], got \[4, 36\]"),
    (GPT, {"gate": "channel"}, r"gates\.0\.logit must be \[36\], got \[1\]"),
    (
        GPT,
        {"gate": "linear"},
        r"4 of .* missing \('gates\.0\.weight'.*2 unexpected \('gates\.0\.lo",
    ),
    (GPT, {"gated_blocks": 1}, r"0 of .* missing.*1 unexpected \('gates\.1\.logit'\)"),
    (GPT, {"temperature": 0.5}, r"3 unexpected \('temperatures\.0'"),
    (GPT, {"method": "gpt-deep"}, r"1 of .* missing \('deep_prompts\.tokens'\)"),
    (DEEP, {"method": "gpt"}, r"with method='gpt', num_prompts=4.*1 unexpected \('deep_prompts"),
    (GPT, {"method": "vpt-shallow"}, r"5 unexpected \('gates\.0\.logit'"),
    (GPT, {"method": "linear"}, r"unexpected \('prompts\.tokens'"),
    (VPT, {"gate": "scalar"}, r"no tensors for gate='scalar'; they show method 'vpt-shallow'"),
    (VPT, {"gated_blocks": 2}, r"no tensors for gated_blocks=2"),
    (VPT, {"temperature": True}, r"3 of .* missing \('temperatures\.0'"),
    ({"method": "linear"}, {"num_prompts": 4}, r"no tensors for num_prompts=4.* method 'linear'"),
    ({"method": "linear"}, {"method": "gpt"}, r"missing \('prompts\.tokens'"),
]


def flags(vit):
    modes = [(name, type(module), module.training) for name, module in vit.named_modules()]
    return modes, [parameter.requires_grad for parameter in vit.parameters()]


def refuses(source, pattern, backbone=None, error=gp.CheckpointError, **options):
    backbone = fresh() if backbone is None else backbone
    tensors, before = copy.deepcopy(backbone.state_dict()), flags(backbone)
    with pytest.raises(error, match=pattern):
        loaded(source, backbone, **options)
    assert flags(backbone) == before
    assert all(torch.equal(t, tensors[name]) for name, t in backbone.state_dict().items())
    backbone(IMAGES)  # not wrapped


@pytest.mark.parametrize(("options", "given", "pattern"), WRONG, ids=str)
def test_options_that_contradict_the_tensors(options, given, pattern):
    refuses(make_case("MAE-style", options).state_dict(), pattern, **given)


def test_damaged_states():
    state = make_case("MAE-style", GPT).state_dict()
    refuses(
        without(state, "head.bias"), r"does not fit a model with .*1 of .* missing \('head\.bias"
    )
    refuses({**state, "extra": torch.ones(1)}, r"1 unexpected \('extra'\)")
    refuses({**state, "epoch": 3}, r"must be tensors: 'epoch'")
    lacking = without(state, "backbone.blocks.1.norm1.bias")
    refuses(lacking, r"does not fit the backbone: 1 of .* missing \('backbone\.blocks\.1\.norm1")
    nan = torch.full_like(state["backbone.cls_token"], torch.nan)
    refuses({**state, "backbone.cls_token": nan}, r"cls_token must be finite, got 36 NaN")
    nan = torch.full_like(state["prompts.tokens"], torch.nan)
    refuses({**state, "prompts.tokens": nan}, r"prompts\.tokens must be finite")
    loaded({**state, "prompts.tokens": nan}, fresh(), allow_nonfinite=True, rule="mix", pool="cls",
           prompt_position="start")  # fmt: skip
    refuses(
        {**state, "prompts.tokens": torch.ones(3)}, r"prompts\.tokens must be \[P, D\], got \[3"
    )
    refuses(
        {**state, "gates.0.logit": torch.ones(7)}, r"gates\.0\.logit must have the shape of one"
    )
    refuses(without(state, "gates.0.logit"), r"gates\.0\.logit or gates\.0\.weight is missing")
    other = small_vit(init_values=None, embed_dim=24)
    refuses(state, r"does not fit a model with .* must be \[.*24\], got", backbone=other)
    refuses(state, r"missing \('backbone\.blocks\.3", backbone=small_vit(init_values=None, depth=4))
    refuses(
        state, r"unexpected \('backbone\.blocks\.2", backbone=small_vit(init_values=None, depth=2)
    )


def test_damaged_files(tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(make_case("MAE-style", GPT).state_dict(), path)
    data = path.read_bytes()
    refuses(path, "SHA-256 must be", expect_sha256="0" * 64)
    path.write_bytes(data[: len(data) // 2])
    refuses(path, "truncated or damaged")
    refuses(tmp_path / "nothing.pth", "No such file", error=FileNotFoundError)
    refuses({}, "expect_sha256 needs a path", error=ValueError, expect_sha256="0" * 64)


def test_other_files_and_backbones():
    model = make_case("MAE-style", GPT)
    plain = fresh().state_dict()
    refuses(plain, r"must contain a wrapped model .* got 'cls_token'.*gp\.load_backbone reads")
    refuses(with_prefix("mybackbone.", plain), r"must contain a wrapped model")
    refuses(with_prefix("backbone.", plain), r"must contain a wrapped model")
    refuses({"a": 1}, r"load_wrapped: the file's 1 keys fit no known layout")
    refuses(model.state_dict(), r"unexpected keyword argument 'gates'", error=TypeError, gates=3)
    refuses(gp.tuned_state_dict(model), r"load_wrapped: the file's .* keys fit no known layout")
    two = with_prefix("student.", model.state_dict()) | with_prefix("teacher.", model.state_dict())
    refuses(two, r"load_wrapped: which must be one of \('student\.backbone', ", error=ValueError)
    with pytest.raises(RuntimeError, match="vit is wrapped already"):
        gp.load_wrapped(model.state_dict(), model.backbone)


def test_other_loaders_name_load_wrapped():
    model = make_case("CLIP-style", GPT)
    state, options = model.state_dict(), hidden_of(model)
    for whole in (state, {"state_dict": state}):
        with pytest.raises(gp.CheckpointError, match=r"; gp\.load_wrapped loads a whole state"):
            gp.load_tuned_state_dict(model, whole)
    with pytest.raises(
        gp.CheckpointError, match=r"q_norm\.norm.*; gp\.load_wrapped loads the whole"
    ):
        gp.load_backbone(fresh("CLIP-style"), state)
    loaded(state, fresh("CLIP-style"), **options)
    report = gp.load_backbone(fresh(), make_case("MAE-style", GPT).state_dict())
    assert re.search(r"left out 8 outside 'backbone\.' .*; gp\.load_wrapped loads the", str(report))


# ---- attached models ----


ATTACHED_IN = {
    "state dict": lambda state: state,
    "timm": lambda state: {"state_dict": state, "epoch": 3},
    "MAE": lambda state: {"model": state},
    "DDP": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "Lightning": lambda s: {"state_dict": {f"model._orig_mod.{n}": t for n, t in s.items()}},
}


@pytest.mark.parametrize("container", ATTACHED_IN)
@pytest.mark.parametrize("options", ["gpt", "vpt-shallow", "vpt-deep", "gpt-deep", "linear gate"])
def test_attached_models_have_identical_logits(options, container, tmp_path):
    from stacks import STACKS
    from test_attach import OPTIONS as CASES
    from test_attach import attached, images

    model, x = attached("DINO", options), images()
    torch.save(ATTACHED_IN[container](model.state_dict()), tmp_path / "whole.pth")
    other = STACKS["DINO"].model()
    torch.nn.init.ones_(other.blocks[1].mlp[0].weight)
    given = {k: v for k, v in CASES[options].items() if k in ("rule", "start")}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        again = gp.load_attached(tmp_path / "whole.pth", other, **given)
    assert again is other
    assert not again.training
    assert torch.equal(again(x), model(x))
    (told,) = [str(w.message) for w in found]
    assert told.startswith("load_attached: assumed ")
    assert "keep_prompts=False" in told
    assert ("rule=" in told) == (options in ("gpt", "gpt-deep"))


def test_files_that_do_not_fit_are_refused_and_the_model_is_not_attached(tmp_path):
    from stacks import STACKS
    from test_attach import attached

    state = attached("DINO").state_dict()
    name = "gated_prompts.prompts.tokens"
    for change, options, words in (
        ({}, {"num_prompts": 4}, r"prompts.tokens must be \[4, 16\], got \[3, 16\]"),
        ({}, {"method": "gpt-deep"}, r"1 of \d+ tensors missing \('gated_prompts.deep_prompts"),
        ({"other": torch.ones(1)}, {}, r"1 unexpected \('other'\)"),
        ({"norm.bias": torch.full((16,), float("nan"))}, {}, "norm.bias must be finite"),
        ({name: None}, {}, "the file must contain one attached model"),
    ):
        changed = {n: t for n, t in {**state, **change}.items() if t is not None}
        model = STACKS["DINO"].model()
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(gp.CheckpointError, match=f"load_attached: .*{words}"):
            gp.load_attached(changed, model, **options)
        assert not hasattr(model, "gated_prompts")
        assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(ValueError, match="load_attached: expect_sha256 needs a path, got a"):
        gp.load_attached(state, STACKS["DINO"].model(), expect_sha256="0" * 64)


def test_a_folder_in_parts_is_read_by_its_index(tmp_path):
    from stacks import STACKS
    from test_attach import attached, images

    model, x = attached("DINO", "vpt-shallow"), images()
    state = model.state_dict()
    names, parts = sorted(state), {}
    for part in range(2):
        chosen = {name: state[name].clone() for name in names[part::2]}
        save_file(chosen, tmp_path / f"model-{part}.safetensors")
        parts |= dict.fromkeys(chosen, f"model-{part}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    with pytest.warns(UserWarning, match="load_attached: assumed"):
        again = gp.load_attached(tmp_path, STACKS["DINO"].model())
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="load_attached: expect_sha256 needs one file"):
        gp.load_attached(tmp_path, STACKS["DINO"].model(), expect_sha256="0" * 64)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(gp.CheckpointError, match="must name files in its folder"):
        gp.load_attached(tmp_path, STACKS["DINO"].model())
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        gp.load_attached(tmp_path, STACKS["DINO"].model())
