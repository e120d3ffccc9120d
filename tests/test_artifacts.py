# SPDX-License-Identifier: Apache-2.0
"""Saved tuned models: loading returns exactly what was saved or raises, whatever the damage."""

import contextlib
import copy
import errno
import hashlib
import json
import os
import random
import signal
import struct
import time
import warnings

import pytest
import safetensors.torch
import torch
from conftest import timm_or_skip
from torch import nn

import gated_prompt as gp

timm_or_skip()
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from gated_prompt import temperature as attention
from gated_prompt.vit import tuned_files
from gated_prompt.vit.backbone_identity import identity_of
from gated_prompt.vit.checkpoint_file import CheckpointError
from gated_prompt.vit.tuned_files import load_tuned, read_config, save_tuned
from gated_prompt.vit.tuned_state import load_tuned_state_dict, tuned_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG, TENSORS = "config.json", "tuned.safetensors"
BIRDS = ["wren", "ровный", "../../etc/passwd", "\x1b[31mred\x1b[0m", ""]


def small_vit(seed=0, family=VisionTransformer, **changes):
    torch.manual_seed(seed)
    options = {
        "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3,
        "num_classes": 5, "global_pool": "token",
    }  # fmt: skip
    vit = family(**{**options, **changes})
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def tuned_model(vit=None, method="gpt", seed=1, **options):
    model = gp.wrap(small_vit() if vit is None else vit, method, num_prompts=4, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.tuned_parameters().values():
            parameter.copy_(0.7 + 0.3 * torch.randn(parameter.shape))
    return model.eval()


def logits(model, dtype=torch.float32):
    torch.manual_seed(2)
    images = torch.randn(2, 3, *model.backbone.patch_embed.img_size, dtype=dtype)
    is_narrow = model.options.frozen_dtype is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
        return model(images)


def tensors_of(vit):
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


def sign(config):
    """Returns the config with a valid digest, as save_tuned writes it. Attackers can do so too."""
    config = {name: value for name, value in config.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(config, indent=2).encode()).hexdigest()
    return json.dumps({**config, "sha256": digest}, indent=2).encode()


@contextlib.contextmanager
def left_alone(vit):
    """Asserts that the `with` block leaves the backbone's modules, tensors and flags unchanged."""
    before = tensors_of(vit), list(vit.named_modules()), vars(vit).copy()
    flags = (
        [(p.requires_grad, p.dtype) for p in vit.parameters()],
        [m.training for m in vit.modules()],
    )
    yield
    after = tensors_of(vit)
    assert before[0].keys() == after.keys()
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert before[1:] == (list(vit.named_modules()), vars(vit))
    assert flags == (
        [(p.requires_grad, p.dtype) for p in vit.parameters()],
        [m.training for m in vit.modules()],
    )


@pytest.fixture
def saved(tmp_path):
    """Returns a folder and the model that was saved in it."""
    model = tuned_model()
    return save_tuned(model, tmp_path / "birds", class_names=BIRDS, metrics={"top1": 0.5}), model


# ---- round trips ----

OPTIONS = [
    {"method": "linear"},
    {"method": "full"},
    {"method": "bias"},
    {"method": "partial-1"},
    {"method": "vpt-shallow"},
    {"method": "vpt-deep"},
    {"method": "gpt"},
    {"method": "gpt-deep"},
    {"method": "gpt", "gate": "linear", "rule": "residual", "prompt_position": "end"},
    {"method": "gpt", "gate": "full", "pool": "prompt"},
    {"method": "gpt", "gate": None, "temperature": 0.5},
    {"method": "gpt", "frozen_dtype": torch.bfloat16},
    {"method": "bias", "frozen_dtype": torch.bfloat16},
    {"method": "linear", "attention": "math", "memory": "low", "last_block": "pooled-rows"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o.values())))
def test_a_round_trip_gives_the_same_logits(tmp_path, options):
    model = tuned_model(**options)
    folder = save_tuned(model, str(tmp_path / "birds"), class_names=BIRDS)
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    loaded = load_tuned(folder, small_vit())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.options == model.options
    assert loaded.class_names == BIRDS
    assert not loaded.training
    wanted, got = model.tuned_parameters(), loaded.tuned_parameters()
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert torch.equal(wanted[name], got[name]), name
        assert wanted[name].dtype == got[name].dtype


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 0},
        {"family": Eva, "use_rot_pos_emb": True, "use_abs_pos_emb": False},
        {"reg_tokens": 2, "init_values": 0.1, "img_size": (40, 24)},
        {"global_pool": "avg", "qk_norm": True},
    ],
    ids=str,
)
def test_a_round_trip_of_other_backbones(tmp_path, changes):
    model = tuned_model(small_vit(**changes))
    save_tuned(model, tmp_path)
    assert torch.equal(logits(load_tuned(tmp_path, small_vit(**changes))), logits(model))


def test_a_round_trip_in_float64_keeps_every_digit(tmp_path):
    model = tuned_model().double()
    with torch.no_grad():
        model.gates[0].logit.fill_(1 / 3)
    save_tuned(model, tmp_path)
    loaded = load_tuned(tmp_path, small_vit().double())
    assert torch.equal(logits(loaded, torch.float64), logits(model, torch.float64))
    with pytest.raises(CheckpointError, match="dtype='float64', got 'float32'"):
        load_tuned(tmp_path, small_vit())


def test_prompts_from_images_need_none_to_load(tmp_path):
    images = torch.randn(6, 3, 32, 32)
    model = tuned_model(prompt_init="kmeans", init_images=images)
    save_tuned(model, tmp_path)
    loaded = load_tuned(tmp_path, small_vit())
    assert loaded.options == model.options
    assert torch.equal(logits(loaded), logits(model))
    save_tuned(loaded, tmp_path)
    assert torch.equal(logits(load_tuned(tmp_path, small_vit())), logits(model))


def test_the_file_holds_what_was_tuned_and_nothing_else(saved):
    folder, model = saved
    names = {"prompts.tokens", "head.weight", "head.bias", "gates.0.logit", "gates.1.logit"}
    names |= {f"temperatures.{index}" for index in range(3)}
    assert safetensors.torch.load_file(folder / TENSORS).keys() == names
    assert read_config(folder)["tensors"].keys() == names == tuned_state_dict(model).keys()


@pytest.mark.parametrize("method", ["linear", "full", "bias", "partial-2", "vpt-deep", "gpt"])
def test_names_are_those_of_tuned_parameters(method):
    model = tuned_model(method=method)
    assert tuned_state_dict(model).keys() == model.tuned_parameters().keys()


def test_what_was_frozen_or_thawed_by_hand_is_saved_too(tmp_path):
    model = tuned_model()
    model.gates[0].requires_grad_(False)
    model.backbone.norm.requires_grad_(True)
    with torch.no_grad():
        model.backbone.norm.weight.mul_(2)
    save_tuned(model, tmp_path)
    loaded = load_tuned(tmp_path, small_vit())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.backbone.norm.weight.requires_grad


def test_other_class_counts_no_head_and_metrics(tmp_path):
    model = tuned_model()
    model.reset_classifier(7)
    metrics = {"top1": 0.25, "per class": [0.1, 0.4], "seed": 3}
    save_tuned(model, tmp_path / "a", class_names=tuple("abcdefg"), metrics=metrics)
    assert load_tuned(tmp_path / "a", small_vit()).num_classes == 7
    assert read_config(tmp_path / "a")["metrics"] == metrics
    model.reset_classifier(0)
    save_tuned(model, tmp_path / "b")
    loaded = load_tuned(tmp_path / "b", small_vit())
    assert loaded.num_classes == 0
    assert loaded.class_names is None


def test_class_names_outlive_a_second_save(saved, tmp_path):
    loaded = load_tuned(saved[0], small_vit())
    save_tuned(loaded, tmp_path / "again")
    assert read_config(tmp_path / "again")["class_names"] == BIRDS
    loaded.reset_classifier(3)
    save_tuned(loaded, tmp_path / "again")
    assert read_config(tmp_path / "again")["class_names"] is None


def test_how_it_runs_can_be_chosen_anew(saved):
    folder, model = saved
    loaded = load_tuned(folder, small_vit(), attention="math", memory="low")
    assert loaded.options.attention == "math"
    torch.testing.assert_close(logits(loaded), logits(model))
    with left_alone(vit := small_vit()), pytest.raises(TypeError, match="num_prompts"):
        load_tuned(folder, vit, num_prompts=3)


def test_unwrap_gives_the_backbone_back(saved):
    with left_alone(vit := small_vit()):
        assert gp.unwrap(load_tuned(saved[0], vit)) is vit


@pytest.mark.cuda
def test_a_file_saved_on_one_device_loads_on_the_other(saved, tmp_path):
    folder, model = saved
    loaded = load_tuned(folder, small_vit().cuda())
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    save_tuned(loaded, tmp_path / "back", class_names=BIRDS, metrics={"top1": 0.5})
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(logits(load_tuned(tmp_path / "back", small_vit())), logits(model))


# ---- the backbone ----


def with_other(vit, change):
    change(vit)
    return vit


OTHERS = {
    "weights": (lambda: small_vit(seed=9), "another SHA-256"),
    "one element": (
        lambda: with_other(small_vit(), lambda v: v.blocks[2].mlp.fc2.bias.data[3].add_(1e-3)),
        "another SHA-256",
    ),
    "heads of the same shapes": (lambda: small_vit(num_heads=6), "num_heads=3, got 6"),
    "image size": (lambda: small_vit(img_size=40), r"img_size=\[32, 32\], got \[40, 40\]"),
    "eps": (
        lambda: with_other(small_vit(), lambda v: setattr(v.norm, "eps", 1e-5)),
        "norm='LayerNorm, eps=1e-06', got 'LayerNorm, eps=1e-05'",
    ),
    "eps in blocks": (
        lambda: with_other(small_vit(), lambda v: setattr(v.blocks[0].norm1, "eps", 1e-5)),
        "norm1='LayerNorm, eps=1e-06'",
    ),
    "activation": (lambda: small_vit(act_layer=nn.SiLU), "activation="),
    "final norm": (lambda: small_vit(global_pool="avg"), "fc_norm='Identity, eps=None'"),
    "depth": (lambda: small_vit(depth=2), "depth=3, got 2"),
    "family": (lambda: small_vit(family=Eva), "model='VisionTransformer', got 'Eva'"),
    "dtype": (lambda: small_vit().bfloat16(), "dtype='float32', got 'bfloat16'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_backbone_is_refused(saved, name):
    build, text = OTHERS[name]
    with left_alone(vit := build()), pytest.raises(CheckpointError, match=text):
        load_tuned(saved[0], vit)


@pytest.mark.parametrize("name", ["weights", "one element", "heads of the same shapes", "eps"])
def test_another_backbone_gives_a_warning_where_asked(saved, name):
    build, text = OTHERS[name]
    with pytest.warns(UserWarning, match=text):
        loaded = load_tuned(saved[0], build(), strict_backbone=False)
    assert torch.equal(loaded.prompts.tokens, saved[1].prompts.tokens)


def test_tensors_that_do_not_fit_are_refused_in_any_case(saved):
    vit = small_vit(embed_dim=36)
    with left_alone(vit), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=r"prompts.tokens must be \[4, 36\], got \[4, 48"):
            load_tuned(saved[0], vit, strict_backbone=False)


def test_rotary_positions_are_part_of_the_backbone(tmp_path):
    changes = {"family": Eva, "use_rot_pos_emb": True, "use_abs_pos_emb": False}
    save_tuned(tuned_model(small_vit(**changes)), tmp_path)
    vit = small_vit(**changes, rope_temperature=100.0)
    with pytest.raises(CheckpointError, match="rope="):
        load_tuned(tmp_path, vit)


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "gpt", "bias", "partial-1"])
def test_the_frozen_digest_depends_on_neither_patches_nor_options(method):
    vit = small_vit()
    model = gp.wrap(vit, method, num_prompts=4, frozen_dtype=torch.bfloat16)
    names = tuned_state_dict(model)
    wrapped = identity_of(vit, names)
    assert wrapped == identity_of(gp.unwrap(model), names)
    with torch.no_grad():
        vit.head.weight.add_(1)  # the wrapper has its own head
    assert wrapped == identity_of(vit, names)
    with torch.no_grad():
        vit.pos_embed[0, 0, 0] += 1
    assert wrapped != identity_of(vit, names)


def test_narrowed_weights_load_wide_and_back(tmp_path):
    model = tuned_model(frozen_dtype=torch.bfloat16)
    save_tuned(model, tmp_path)
    wide = load_tuned(tmp_path, small_vit(), frozen_dtype=None)
    assert torch.equal(logits(wide), logits(tuned_model()))
    save_tuned(wide, tmp_path)
    narrow = load_tuned(tmp_path, small_vit(), frozen_dtype=torch.bfloat16)
    assert torch.equal(logits(narrow), logits(model))


def test_a_wrapped_backbone_is_refused(saved):
    folder, model = saved
    with pytest.raises(TypeError, match="wrapped already"):
        load_tuned(folder, model)
    with pytest.raises(RuntimeError, match="wrapped already"):
        load_tuned(folder, model.backbone)
    with pytest.raises(TypeError, match=r"torch.nn.modules.linear.Linear"):
        load_tuned(folder, nn.Linear(2, 2))


def named_vit(**changes):
    vit = small_vit(**changes)
    vit.pretrained_cfg = {
        "architecture": "vit_tiny_patch16_224", "tag": "augreg_in21k", "mean": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
    }  # fmt: skip
    return vit


def test_without_a_backbone_it_is_built_by_name(tmp_path, monkeypatch):
    model = tuned_model(named_vit())
    save_tuned(model, tmp_path)
    asked = {}

    def create_backbone(name, **options):
        asked.update(options, name=name)
        return named_vit()

    monkeypatch.setattr(tuned_files, "create_backbone", create_backbone)
    assert torch.equal(logits(load_tuned(tmp_path)), logits(model))
    assert asked == {
        "name": "vit_tiny_patch16_224.augreg_in21k", "pretrained": True, "img_size": (32, 32),
        "global_pool": "token",
    }  # fmt: skip
    saved = read_config(tmp_path)["backbone"]["input"]
    assert (saved["mean"], saved["interpolation"]) == ([0.5, 0.5, 0.5], "bicubic")


def test_without_a_backbone_and_offline_the_message_says_what_to_do(tmp_path, monkeypatch):
    def create_backbone(name, **options):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(tuned_files, "create_backbone", create_backbone)
    save_tuned(tuned_model(named_vit()), tmp_path)
    with pytest.raises(CheckpointError, match=r"ConnectionError: offline\).*pass backbone=$"):
        load_tuned(tmp_path)
    from_file = named_vit()
    from_file._gated_prompt_source = "mae"
    for vit, text in ((from_file, "came from mae"), (small_vit(), "without a timm name")):
        save_tuned(tuned_model(vit), tmp_path)
        with pytest.raises(CheckpointError, match=f"{text}.*pass backbone="):
            load_tuned(tmp_path)


# ---- damage ----


def silent_loads(folder, damages):
    """Counts the damaged files that load. Any error other than a CheckpointError fails the test."""
    vit, silent, messages = small_vit(), 0, []
    with left_alone(vit):
        for name, data in damages:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(data)
            try:
                gp.unwrap(load_tuned(folder, vit))
                silent += 1
            except CheckpointError as error:
                messages.append(str(error))
            (folder / name).write_bytes(whole)
        gp.unwrap(load_tuned(folder, vit))
    assert all(folder.name in message for message in messages)
    return silent


def test_flipped_bits_are_never_loaded(saved):
    folder, _ = saved
    rng, damages = random.Random(0), []
    sizes = {name: (folder / name).stat().st_size for name in (TENSORS, CONFIG)}
    for position in rng.sample(range(sum(sizes.values())), 400):
        name = TENSORS if position < sizes[TENSORS] else CONFIG
        data = bytearray((folder / name).read_bytes())
        data[position % sizes[TENSORS] if name == TENSORS else position - sizes[TENSORS]] ^= (
            1 << rng.randrange(8)
        )
        damages.append((name, data))
    assert {name for name, _ in damages} == {TENSORS, CONFIG}
    assert silent_loads(folder, damages) == 0


def test_bytes_that_change_no_value_are_not_loaded_either(saved):
    folder, _ = saved
    text, data = (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    padded = data[: header - 1] + b"\n" + data[header:]
    assert data[header - 1 : header] == b" "
    assert safetensors.torch.load(padded).keys() == safetensors.torch.load(data).keys()
    changed = text.replace(b"\n  ", b"\n\t", 1), text + b"\n", text.replace(b"0.5", b"0.50")
    damages = [(CONFIG, new) for new in changed] + [(TENSORS, padded)]
    assert silent_loads(folder, damages) == 0


def test_truncated_files_are_not_loaded(saved):
    folder, _ = saved
    damages = []
    for name in (TENSORS, CONFIG):
        data = (folder / name).read_bytes()
        damages += [(name, data[: len(data) * part // 64]) for part in range(64)]
        damages += [(name, data[:-1]), (name, data + b"\0")]
    assert silent_loads(folder, damages) == 0


def resaved(folder, change):
    """Applies `change` to the tensors and writes their file again; config.json is unchanged."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("gates.1.logit"), r"lacks 'gates.1.logit'"),
        (lambda t: t.update(extra=torch.ones(2)), r"has unknown 'extra'"),
        (
            lambda t: t.update({"head.bias": torch.ones(6)}),
            r"'head.bias' must be float32 \[5\], got float32 \[6\]",
        ),
        (
            lambda t: t.update({"head.bias": t["head.bias"].double()}),
            r"'head.bias' must be float32 \[5\], got float64 \[5\]",
        ),
        (lambda t: t["prompts.tokens"].add_(1), r"the values of 'prompts.tokens' are damaged"),
    ],
    ids=["missing", "extra", "shape", "dtype", "values"],
)
def test_the_tensor_at_fault_is_named(saved, change, text):
    folder, _ = saved
    resaved(folder, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_tuned(folder, small_vit())
    assert TENSORS in str(caught.value)


def test_files_of_two_saves_do_not_go_together(saved, tmp_path):
    folder, _ = saved
    save_tuned(tuned_model(seed=5), tmp_path / "other", class_names=BIRDS)
    os.replace(tmp_path / "other" / TENSORS, folder / TENSORS)
    with pytest.raises(CheckpointError, match="does not match config"):
        load_tuned(folder, small_vit())


def put(config, path, value):
    *parents, last = path.split("/")
    for name in parents:
        config = config[name]
    config[last] = value


HOSTILE = {  # name: (path in config.json, value, text of the error); the digest is always valid
    "newer format": ("format", 2, "format 1, got 2"),
    "format of another type": ("format", "1", "format 1, got '1'"),
    "a class to make": ("_target_", "os.system", "unknown '_target_'"),
    "a class to make, inside": ("backbone/_target_", "os.system", "unknown '_target_'"),
    "an option to make": ("options/_target_", "os.system", "options .* '_target_'"),
    "options as a list": ("options", [], "wrong type list for 'options'"),
    "class names as a dict": ("class_names", {}, "wrong type dict"),
    "class names of ints": ("class_names", [1, 2, 3, 4, 5], "not strings"),
    "class names too few": ("class_names", ["a"], "1 class names for 5"),
    "metrics": ("metrics", 3, "wrong type int for 'metrics'"),
    "tensors": ("tensors/head.bias", 5, "describes 'head.bias'"),
    "digest": ("tensors/head.bias", "float32 [5] abc", "describes 'head.bias'"),
    "digest of the file": ("tensors_sha256", 7, "wrong type int"),
    "identity": (
        "backbone/frozen_sha256",
        None,
        "wrong type NoneType for 'frozen_sha256' of the b",
    ),
    "facts": ("backbone/facts/num_heads", "three", "num_heads='three', got 3"),
    "a head that is a scalar": ("tensors/head.weight", "float32 [] " + "0" * 64, "5 class names"),
    "many prompts": ("options/num_prompts", 10**12, "num_prompts=1000000000000, and 4"),
    "prompts as a str": ("options/num_prompts", "4", "num_prompts='4'"),
    "prompts as a float": ("options/num_prompts", 4.0, "num_prompts must be an int"),
    "method": ("options/method", "__import__('os')", "method must be one of"),
    "method as a list": ("options/method", ["gpt"], "method must be one of"),
    "another method": ("options/method", "gpt-deep", "missing .*'deep_prompts.tokens'"),
    "gate": ("options/gate", "linear", "unexpected .*'gates.0.logit'"),
    "gate as a dict": ("options/gate", {"_target_": "x"}, "gate must be one of"),
    "gate_init": ("options/gate_init", "x", "birds"),
    "gated_blocks": ("options/gated_blocks", 10**9, "gated_blocks must be in"),
    "dtype": ("options/frozen_dtype", "load", "frozen_dtype must be one of"),
    "dtype as a list": ("options/frozen_dtype", [], "birds"),
    "dropout": ("options/prompt_dropout", {}, "birds"),
    "pool": ("options/pool", 3, "pool must be one of"),
    "attention": ("options/attention", "xformers", "attention='xformers' can't run"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused(saved, name):
    folder, _ = saved
    if name == "attention" and attention.unavailable_reason("xformers") is None:
        pytest.skip("xformers runs here")
    path, value, text = HOSTILE[name]
    config = json.loads((folder / CONFIG).read_bytes())
    put(config, path, value)
    (folder / CONFIG).write_bytes(sign(config))
    with left_alone(vit := small_vit()), pytest.raises(CheckpointError, match=text) as caught:
        load_tuned(folder, vit)
    assert "birds" in str(caught.value)


def test_what_an_attacker_signs_would_load(saved):
    """Without this test, the cases above might fail only because of their digest."""
    folder, _ = saved
    config = json.loads((folder / CONFIG).read_bytes())
    put(config, "metrics", {"top1": 1.0})
    (folder / CONFIG).write_bytes(sign(config))
    load_tuned(folder, small_vit())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{}", b"<!DOCTYPE html>", b"\x80\x04.", b"{" * 100_000,
        b"[" * 100_000, b'{"format": NaN}', b'{"format": 1' + b"0" * 5000 + b"}",
        '{"format": 1}'.encode("utf-16"), b'{"format": 1, "format": 1}', b" " * (17 << 20),
    ],
    ids=lambda data: f"{data[:20]}",
)  # fmt: skip
def test_a_config_that_is_none_is_refused(saved, data):
    (saved[0] / CONFIG).write_bytes(data)
    with pytest.raises(CheckpointError, match=CONFIG):
        load_tuned(saved[0], small_vit())


@pytest.mark.parametrize("name", list(tuned_files._FIELDS))
def test_every_field_of_the_config_is_needed(saved, name):
    config = json.loads((saved[0] / CONFIG).read_bytes())
    del config[name]
    (saved[0] / CONFIG).write_bytes(json.dumps(config).encode())
    with pytest.raises(CheckpointError, match=name):
        load_tuned(saved[0], small_vit())


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("architecture", "hf-hub:evil/model", "name must be one of timm's models"),
        ("architecture", "local-dir:/tmp/evil", "name must be one of timm's models"),
        ("architecture", "../../evil", "name must be one of timm's models"),
        ("architecture", "resnet18", "can't be built here"),
        ("facts/img_size", [10**9, 10**9], "img_size must be two sides"),
        ("facts/img_size", "big", "img_size must be two sides"),
        ("facts/img_size", [], "img_size must be two sides"),
        ("facts/img_size", [True, True], "img_size must be two sides"),
    ],
)
def test_a_config_can_not_name_any_other_source(tmp_path, monkeypatch, field, value, text):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_tuned(tuned_model(named_vit()), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_bytes())
    put(config["backbone"], field, value)
    put(config["backbone"], "tag", "" if field == "architecture" else "augreg_in21k")
    (tmp_path / CONFIG).write_bytes(sign(config))
    with pytest.raises(CheckpointError, match=text):
        load_tuned(tmp_path)


def test_missing_files_and_wrong_kinds_of_them(saved, tmp_path):
    folder, model = saved
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tuned(tmp_path / "nowhere", small_vit())
    with pytest.raises(NotADirectoryError, match=CONFIG):
        load_tuned(folder / CONFIG, small_vit())
    with pytest.raises((NotADirectoryError, FileExistsError), match=f"save_tuned.*{CONFIG}"):
        save_tuned(model, folder / CONFIG)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_tuned(tmp_path, small_vit())
    os.unlink(folder / TENSORS)
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_tuned(folder, small_vit())
    os.mkfifo(folder / TENSORS)  # opening a pipe would block
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_tuned(folder, small_vit())
    os.unlink(folder / CONFIG)
    os.mkfifo(folder / CONFIG)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_tuned(folder, small_vit())


# ---- saving ----


def test_bad_arguments_write_nothing(tmp_path):
    model = tuned_model()
    for error, options, text in (
        (TypeError, {"class_names": "wrens"}, "class_names must be a list"),
        (ValueError, {"class_names": ["a"]}, "1 class names for 5"),
        (ValueError, {"class_names": [1, 2, 3, 4, 5]}, "not strings"),
        (ValueError, {"metrics": {"loss": float("nan")}}, "metrics must be finite"),
        (TypeError, {"metrics": {"loss": torch.ones(())}}, "metrics must be finite, and JSON"),
        (ValueError, {"metrics": [0.5]}, "wrong type list for 'metrics'"),
    ):
        with pytest.raises(error, match=text):
            save_tuned(model, tmp_path / "birds", **options)
    with pytest.raises(
        TypeError, match=r"model must be what wrap returned .*, got VisionTransformer"
    ):
        save_tuned(small_vit(), tmp_path / "birds")
    for head in (nn.Sequential(nn.Linear(48, 5)), nn.Linear(48, 5, bias=False)):
        model.head = head
        with pytest.raises(ValueError, match="head must be"):
            save_tuned(model, tmp_path / "birds")
    assert os.listdir(tmp_path) == []


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tuned.safetensors.bak").write_text("mine")
    for _ in range(2):
        save_tuned(tuned_model(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [CONFIG, "notes.txt", TENSORS, "tuned.safetensors.bak"]


@pytest.mark.parametrize("name", [CONFIG, TENSORS, f"{CONFIG}.new", f"{TENSORS}.new"])
@pytest.mark.parametrize("is_dangling", [False, True])
def test_no_symbolic_link_is_written_through(tmp_path, name, is_dangling):
    target = tmp_path / "precious"
    if not is_dangling:
        target.write_text("mine")
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / name).symlink_to(target)
    with pytest.raises(OSError, match="symbolic link") as caught:
        save_tuned(tuned_model(), folder)
    assert caught.value.errno == errno.ELOOP
    assert name in str(caught.value)
    assert os.listdir(folder) == [name]
    assert target.exists() != is_dangling
    assert is_dangling or target.read_text() == "mine"


def test_links_are_read_through(saved, tmp_path):
    """The files in the Hugging Face cache are links."""
    folder, model = saved
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, TENSORS):
        (tmp_path / "snapshot" / name).symlink_to(folder / name)
    assert torch.equal(logits(load_tuned(tmp_path / "snapshot", small_vit())), logits(model))


# ---- atomicity ----


def interrupted(folder, model, step, stop):
    """Saves the model and calls `stop` at point number `step`; False if there are fewer points.

    A write has one point, after half of its data. Any other system call has a point before it and
    a point after it.
    """
    count = 0

    def point():
        nonlocal count
        count += 1
        if count == step:
            stop()

    class HalfWritten:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            point()
            self.file.write(data[len(data) // 2 :])

    def around(function):
        def call(*arguments, **options):
            point()
            result = function(*arguments, **options)
            point()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, around(getattr(os, name)))

        def opened(path, mode):
            file = around(open)(path, mode)
            return HalfWritten(file) if mode == "xb" else file

        patch.setattr(tuned_files, "open", opened, raising=False)
        save_tuned(model, folder)
    return count >= step


def which(folder, models):
    """Returns the index of the model that the folder loads as, bit for bit."""
    state = tuned_state_dict(load_tuned(folder, small_vit()))
    same = [
        all(torch.equal(state[name], value) for name, value in tuned_state_dict(model).items())
        for model in models
    ]
    assert sum(same) == 1
    return same.index(True)


def killed(function):
    """Runs the function in a child, which must exit normally or die by SIGKILL; True if it died."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_at_any_point_leaves_the_old_or_the_new(tmp_path):
    models = tuned_model(), tuned_model(seed=5)
    folder, outcomes = tmp_path / "birds", []
    for step in range(1, 100):
        save_tuned(models[0], folder)
        if not killed(lambda: interrupted(folder, models[1], step, die)):  # noqa: B023
            break
        outcomes.append(which(folder, models))
        # kill the next save too; the save after that removes what is left over
        if killed(lambda: interrupted(folder, models[0], 3 + step % 9, die)):  # noqa: B023
            which(folder, models)
        save_tuned(models[1], folder)
        assert which(folder, models) == 1
        assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes), "a kill at a later point left the older files"
    assert set(outcomes) == {0, 1}
    print(f"{len(outcomes)} points: {outcomes.count(0)} old, {outcomes.count(1)} new")


def test_a_full_disk_at_any_point_leaves_the_old_or_the_new(tmp_path):
    models = tuned_model(), tuned_model(seed=5)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    outcomes, errors = [], []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        save_tuned(models[0], folder)
        try:
            if not interrupted(folder, models[1], step, full):
                break
        except OSError as error:
            errors.append((error.errno, str(error), str(folder)))
        outcomes.append(which(folder, models))
        assert sorted(os.listdir(folder)) == [CONFIG, TENSORS], "a failed save left files behind"
    assert len(outcomes) > 15
    assert set(outcomes) == {0, 1}
    for number, text, path in errors:
        assert number == errno.ENOSPC
        assert text.startswith("[Errno 28] save_tuned: No space left")
        assert path in text


def test_kills_at_random_moments_lose_nothing(tmp_path):
    models, rng = (tuned_model(), tuned_model(seed=5)), random.Random(0)
    save_tuned(models[0], tmp_path)
    seen = []
    for start in range(30):
        child = os.fork()
        if child == 0:
            for count in range(start, 10**9):
                save_tuned(models[count % 2], tmp_path)
        time.sleep(0.01 + 0.1 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.append(which(tmp_path, models))
    assert set(seen) == {0, 1}


def test_files_are_on_the_disk_before_they_count(tmp_path, monkeypatch):
    save_tuned(tuned_model(), tmp_path)
    events, fsync, replace = [], os.fsync, os.replace

    def traced_fsync(descriptor):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def traced_replace(source, target):
        events.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    save_tuned(tuned_model(seed=5), tmp_path)
    folder = ("fsync", tmp_path.name)
    assert events == [
        folder, ("fsync", f"{TENSORS}.new"), ("fsync", f"{CONFIG}.new"), folder,
        ("replace", CONFIG), folder, ("replace", TENSORS), folder,
    ]  # fmt: skip


def test_two_savers_and_a_loader_at_once(tmp_path):
    models, children = (tuned_model(), tuned_model(seed=5)), []
    save_tuned(models[0], tmp_path)
    for model in models:
        child = os.fork()
        if child == 0:
            try:
                for _ in range(20):
                    save_tuned(model, tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    for _ in range(10):
        which(tmp_path, models)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


# ---- states ----


def test_a_state_goes_from_model_to_model():
    model, other = tuned_model(), tuned_model(seed=5)
    assert not torch.equal(logits(model), logits(other))
    state = tuned_state_dict(model)
    assert not any(tensor.requires_grad for tensor in state.values())
    load_tuned_state_dict(other, state)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize(
    ("options", "classes", "text"),
    [
        ({"num_prompts": 3}, 5, r"prompts.tokens must be \[3, 48\], got \[4, 48\].*num_prompts=3"),
        (
            {"gate": "linear"},
            5,
            r"missing \('gates.0.bias'.*unexpected \('gates.0.l.*gate='linear'",
        ),
        ({"gate": "channel"}, 5, r"gates.0.logit must be \[48\], got \[1?\]"),
        ({"method": "linear"}, 5, r"unexpected .*method='linear'"),
        ({}, 7, r"head.bias must be \[7\], got \[5\].* 7 classes"),
        ({}, 0, r"unexpected \('head.bias', 'head.weight'\).* 0 classes"),
    ],
)
def test_a_state_of_another_model_is_refused(options, classes, text):
    state = tuned_state_dict(tuned_model())
    other = gp.wrap(small_vit(), **{"num_prompts": 4, **options})
    other.reset_classifier(classes)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=text):
        load_tuned_state_dict(other, state)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_state_must_hold_tensors_for_a_wrapped_model():
    model = tuned_model()
    with pytest.raises(TypeError, match=r"head\.bias must be a tensor"):
        load_tuned_state_dict(model, {**tuned_state_dict(model), "head.bias": [1.0]})
    for function in (tuned_state_dict, lambda m: load_tuned_state_dict(m, {})):
        with pytest.raises(TypeError, match=r"model must be what wrap returned"):
            function(small_vit())


# ---- size ----


def test_a_tuned_vit_b_has_less_than_a_megabyte(tmp_path):
    """100 prompts, 11 gates, 12 temperatures and a head of 200 classes."""
    vit = small_vit(embed_dim=768, depth=12, num_heads=12, patch_size=16, mlp_ratio=0.05)
    model = gp.wrap(vit, "gpt", num_prompts=100)
    model.reset_classifier(200)
    save_tuned(model, tmp_path, class_names=[f"class {index}" for index in range(200)])
    values = 100 * 768 + 11 + 12 + 200 * 768 + 200
    size = (tmp_path / TENSORS).stat().st_size
    assert 4 * values < size < 4 * values + 4096
    print(f"tuned.safetensors {size} B, config.json {(tmp_path / CONFIG).stat().st_size} B")
    assert size < 1_000_000
