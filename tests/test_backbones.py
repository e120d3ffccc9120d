# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files in common layouts: every tensor arrives, or the model stays unchanged."""

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import pickle
import re
import runpy
import struct
import subprocess
import sys
import timeit
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from torch import nn

import gated_prompt as gp

timm = timm_or_skip()
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from gated_prompt.vit import checkpoint_file, layouts
from gated_prompt.vit.backbones import LoadReport, create_backbone, load_backbone
from gated_prompt.vit.checkpoint_file import CheckpointError, read_checkpoint
from gated_prompt.vit.official import load_official

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 16
GRID = {"img_size": 32, "patch_size": 8}
PATCH14 = {"img_size": 28, "patch_size": 14, "init_values": 1e-5}


def randomised(model, seed=1):
    """Gives every parameter its own random values, so that a swap or an omission shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def vit(seed=1, **changes):
    options = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 3, **GRID, **changes}
    return randomised(VisionTransformer(**options), seed)


def fixed_positions(kind, side, width=WIDTH):
    """The fixed position embeddings of MoCo v3 or MAE, one by one; the class token's are 0."""
    rows = [[0.0] * width]
    for row in range(side):
        for column in range(side):
            first, second = (row, column) if kind == "MoCo v3" else (column, row)
            rows.append([])
            for i in range(width):
                quarter, frequency = divmod(i, width // 4)
                angle = (first if quarter < 2 else second) / 10000 ** (4 * frequency / width)
                rows[-1].append(math.cos(angle) if quarter % 2 else math.sin(angle))
    return torch.tensor([rows])


def with_positions(kind, model):
    model.pos_embed.data = fixed_positions(kind, model.patch_embed.grid_size[0], model.embed_dim)
    return model


def mae_vit(seed=1, **changes):
    return with_positions("MAE", vit(seed, **changes))


def moco_vit(seed=1, **changes):
    return with_positions("MoCo v3", vit(seed, **changes))


def eva(seed=1, **changes):
    options = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 3, **GRID, **changes}
    return randomised(Eva(**options), seed)


def flat(model, head=False):
    """Returns copies of the model's tensors under timm's names, as a file has them."""
    state = model.state_dict()
    return {n: t.clone() for n, t in state.items() if head or not n.startswith("head.")}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def training(**entries):
    """Returns a training job's file: `entries`, and what such a job saves with them."""
    parameter = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 300, "arch": "vit_base", "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1.5e-4, betas=(0.9, 0.95), data="/data"),
        "scaler": {"scale": 65536.0}, **entries,
    }  # fmt: skip


def moco(base, momentum, projector=True):
    """A MoCo v3 file: two encoders with a three-layer projector each as head, and a predictor."""
    state = {}
    for which, model in (("base", base), ("momentum", momentum)):
        if model is not None:
            state |= under(f"module.{which}_encoder.", flat(model))
            for layer in (0, 1, 3, 4, 6, 7):
                state[f"module.{which}_encoder.head.{layer}.weight"] = torch.randn(4)
    state |= {f"module.predictor.{n}.weight": torch.randn(4) for n in (0, 1, 3, 4)}
    return training(state_dict=state)


FINETUNING = argparse.Namespace(  # some arguments of MAE's script
    nb_classes=3, drop_path=0.1, global_pool=True, blr=5e-4, finetune="mae_pretrain_vit_base.pth"
)
DECODER = {
    "mask_token": torch.randn(1, 1, 8), "decoder_pos_embed": torch.randn(1, 17, 8),
    "decoder_embed.weight": torch.randn(8, WIDTH), "decoder_blocks.0.norm1.weight": torch.ones(8),
    "decoder_norm.weight": torch.ones(8), "decoder_pred.weight": torch.randn(192, 8),
}  # fmt: skip
MASK = {"mask_token": torch.randn(1, WIDTH)}
DINO_HEAD = {"head.mlp.0.weight": torch.randn(4, 4), "head.last_layer.weight_g": torch.ones(4)}


LOSS = {"loss.weight": torch.ones(3), "metric.total": torch.tensor(7)}
NO_CLASS = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def ijepa(encoder, target):
    """An I-JEPA file: MAE's position embeddings, but only for patches."""
    for model in (encoder, target):
        model.pos_embed.data = fixed_positions("MAE", 4)[:, 1:]
    predictor = {"module.predictor_blocks.0.norm1.bias": torch.ones(8)}
    encoder, target = (under("module.", flat(model)) for model in (encoder, target))
    return {"encoder": encoder, "predictor": predictor, "target_encoder": target,
            "opt": {"state": {}}, "scaler": None, "epoch": 3}  # fmt: skip


def dino(student, teacher):
    return training(
        student=under("module.backbone.", flat(student)) | under("module.", DINO_HEAD),
        teacher=under("backbone.", flat(teacher)) | DINO_HEAD,
        dino_loss={"center": torch.zeros(1, 4)},
    )


def with_registers(model):
    """Returns a timm model with registers under DINOv2's names, with the class token's position."""
    tensors = renamed(flat(model), ("^reg_token$", "register_tokens"))
    row = torch.randn(1, 1, WIDTH)
    tensors["cls_token"] = tensors["cls_token"] - row
    tensors["pos_embed"] = torch.cat([row, tensors["pos_embed"]], dim=1)
    return tensors | MASK


def chunked(tensors):
    """Puts two blocks in a chunk; a block keeps its number in the whole model."""
    return renamed(
        tensors, (r"^blocks\.([01])\.", r"blocks.0.\1."), (r"^blocks\.([23])\.", r"blocks.1.\1.")
    )


def clip_names(model, prefix="visual."):
    tensors = renamed(
        flat(model), (r"^patch_embed\.proj", "conv1"), ("^pos_embed", "positional_embedding"),
        (r"^blocks\.", "transformer.resblocks."), ("^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
        (r"\.norm([12])", r".ln_\1"), (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), ("^cls_token", "class_embedding"),
    )  # fmt: skip
    tensors["class_embedding"] = tensors["class_embedding"][0, 0]
    tensors["positional_embedding"] = tensors["positional_embedding"][0]
    text = {"text_projection": torch.randn(4, 4), "ln_final.weight": torch.ones(4)}
    return under(prefix, tensors | {"proj": torch.randn(WIDTH, 4)}) | text


SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
REGISTERS = {**PATCH14, "reg_tokens": 4, "no_embed_class": True}
DINOV3 = {
    "use_rot_pos_emb": True, "rope_type": "dinov3", "use_abs_pos_emb": False, "num_reg_tokens": 4,
    "init_values": 1e-5, "qkv_bias": False, "global_pool": "avg", "use_fc_norm": False,
}  # fmt: skip


def dinov3(model):
    tensors = renamed(
        flat(model), ("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"),
        ("gamma_2", "ls2.gamma"),
    )  # fmt: skip
    for i in (0, 1):
        tensors[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(3 * WIDTH)
        tensors[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * WIDTH)
    return tensors | {"rope_embed.periods": torch.ones(4)} | MASK


# name: (constructor, its options, file of the model, which, words, source, tensors dropped)
OTHER = 7  # the seed of another model
LAYOUTS = {
    "MAE": (
        mae_vit, {}, lambda m: training(model=flat(m)), None, "MAE, encoder", "mae", 0,
    ),
    "MAE flat": (mae_vit, {}, flat, None, "MAE, encoder", "mae", 0),
    "MAE with a mask token": (
        mae_vit, {}, lambda m: {"model": flat(m) | MASK}, None, "MAE, encoder", "mae", 1,
    ),
    "MAE with decoder": (
        vit, {}, lambda m: training(model=flat(m) | DECODER), None,
        "MAE, encoder and decoder", "mae", 6,
    ),
    "MAE flat, with decoder": (
        vit, {}, lambda m: flat(m) | DECODER, None, "MAE, encoder and decoder", "mae", 6,
    ),
    "MAE fine-tuned": (
        vit, {"global_pool": "avg"},
        lambda m: training(model=flat(m, head=True), args=FINETUNING), None,
        "MAE, fine-tuned", "mae-finetuned", 2,
    ),
    "MAE fine-tuned, published": (
        vit, {"global_pool": "avg"}, lambda m: {"model": flat(m, head=True)}, None,
        "timm's names", "timm", 2,
    ),
    "MoCo v3": (
        vit, {}, lambda m: moco(m, vit(OTHER)), None, "MoCo v3, base", "mocov3", 6 + 36 + 4,
    ),
    "MoCo v3 base": (
        vit, {}, lambda m: moco(m, None), "base", "MoCo v3, base", "mocov3", 6 + 4,
    ),
    "MoCo v3 momentum": (
        vit, {}, lambda m: moco(vit(OTHER), m), "momentum", "MoCo v3, momentum", "mocov3",
        6 + 36 + 4,
    ),
    "MoCo v3 compiled": (
        vit, {}, lambda m: {"state_dict": under("_orig_mod.", moco(m, None)["state_dict"])}, None,
        "MoCo v3, base", "mocov3", 6 + 4,
    ),
    "MoCo v3 flat": (
        moco_vit, {}, lambda m: flat(m) | {"head.0.weight": torch.ones(4, WIDTH)}, None,
        "MoCo v3, encoder", "mocov3", 1,
    ),
    "MoCo v3 linear": (
        moco_vit, {"num_classes": 1000},
        lambda m: training(state_dict=under("module.", flat(m, head=True)), best_acc1=76.7), None,
        "MoCo v3, linear-probed", "mocov3", 2,
    ),
    "DINO flat": (vit, {}, flat, None, "timm's names", "timm", 0),
    "DINO": (vit, {}, lambda m: dino(vit(OTHER), m), None, "DINO, teacher", "dino", 2),
    "DINO compiled": (
        vit, {},
        lambda m: {
            "teacher": under("_orig_mod.", under("backbone.", flat(m)) | DINO_HEAD),
            "student": under("module.", under("backbone.", flat(vit(OTHER))) | DINO_HEAD),
        },
        None, "DINO, teacher", "dino", 2,
    ),
    "DINO student": (vit, {}, lambda m: dino(m, vit(OTHER)), "student", "DINO, student", "dino", 2),
    "DINOv2": (vit, PATCH14, lambda m: flat(m) | MASK, None, "DINOv2", "dinov2", 1),
    "DINOv2 giant": (
        vit, {**PATCH14, **SWIGLU},
        lambda m: renamed(flat(m) | MASK, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")),
        None, "DINOv2", "dinov2", 1,
    ),
    "DINOv2 registers": (vit, REGISTERS, with_registers, None, "DINOv2", "dinov2", 1),
    "DINOv2 training": (
        vit, {**PATCH14, "depth": 4},
        lambda m: {
            "teacher": under("backbone.", chunked(flat(m) | MASK))
            | {"dino_head.last_layer.weight": torch.ones(4), "ibot_head.mlp.0.bias": torch.ones(4)}
        },
        None, "DINOv2, teacher", "dinov2", 3,
    ),
    "timm": (vit, {}, lambda m: flat(m, head=True), None, "timm's names", "timm", 2),
    "timm training": (
        vit, {}, lambda m: training(state_dict=flat(m, head=True)), None, "timm's names", "timm", 2,
    ),
    "timm DDP": (
        vit, {}, lambda m: training(state_dict=under("module.", flat(m, head=True))), None,
        "timm's names", "timm", 2,
    ),
    "timm compiled": (
        vit, {}, lambda m: under("_orig_mod.", flat(m, head=True)), None, "timm's names", "timm", 2,
    ),
    "timm DDP, compiled": (
        vit, {}, lambda m: {"model": under("_orig_mod.module.", flat(m, head=True))}, None,
        "timm's names", "timm", 2,
    ),
    "timm with an EMA": (
        vit, {},
        lambda m: training(state_dict=flat(vit(OTHER), head=True), state_dict_ema=flat(m, True)),
        None, "timm's names, ema", "timm", 2,
    ),
    "timm beside an EMA": (
        vit, {},
        lambda m: training(
            state_dict=under("module.", flat(m, head=True)), state_dict_ema=flat(vit(OTHER))
        ),
        "raw", "timm's names, raw", "timm", 2,
    ),
    "DeiT": (
        vit, {}, lambda m: {"model": flat(m, head=True)}, None, "timm's names", "timm", 2,
    ),
    "DeiT with an EMA": (
        vit, {}, lambda m: training(model_ema=flat(m, True), model=flat(vit(OTHER), head=True)),
        "ema", "timm's names, ema", "timm", 2,
    ),
    "headless model": (
        vit, {}, lambda m: training(model=flat(m), sizes=dict.fromkeys(flat(m), 3)), None,
        "timm's names", "timm", 0,
    ),
    "Lightning": (
        vit, {},
        lambda m: training(
            state_dict=under("net._orig_mod.", flat(m, head=True)) | LOSS, callbacks={}, loops={}
        ),
        None, "timm's names", "timm", 2 + 2,
    ),
    "Lightning, MAE": (
        mae_vit, {}, lambda m: {"state_dict": under("encoder.", flat(m)) | LOSS}, None,
        "MAE, encoder", "mae", 2,
    ),
    "Lightning, CLIP": (
        vit, {"pre_norm": True},
        lambda m: {"state_dict": under("model.", clip_names(m)) | LOSS}, None,
        "CLIP, vision tower", "clip", 3 + 2,
    ),
    "averaged model": (
        vit, {}, lambda m: under("module.", flat(m)) | {"n_averaged": torch.tensor(3)}, None,
        "timm's names", "timm", 1,
    ),
    "backbone and head": (
        vit, {},
        lambda m: under("module.backbone.", flat(m)) | {"module.head.fc.bias": torch.ones(3)},
        None, "timm's names", "timm", 1,
    ),
    "student beside teacher": (
        vit, {},
        lambda m: {"state_dict": under("teacher.", flat(vit(OTHER))) | under("student.", flat(m))},
        "student", "timm's names, student", "timm", 30,
    ),
    "I-JEPA": (
        vit, NO_CLASS, lambda m: ijepa(vit(OTHER, **NO_CLASS), m), None, "timm's names, target",
        "timm", 0,
    ),
    "I-JEPA encoder": (
        vit, NO_CLASS, lambda m: ijepa(m, vit(OTHER, **NO_CLASS)), "encoder",
        "timm's names, encoder", "timm", 0,
    ),
    "timm Eva": (
        eva, {"use_rot_pos_emb": True}, lambda m: flat(m, head=True), None, "timm's names", "timm",
        2,
    ),
    "timm DINOv2": (vit, REGISTERS, flat, None, "timm's names", "timm", 0),
    "EVA": (
        eva, {"global_pool": "avg"},
        lambda m: {
            "module": renamed(flat(m), ("^fc_norm", "norm"))
            | {"lm_head.weight": torch.ones(4)} | MASK
        },
        None, "timm's names", "timm", 2,
    ),
    "OpenCLIP trunk": (
        vit, {},
        lambda m: under("visual.trunk.", flat(m))
        | {"visual.head.proj.weight": torch.ones(4, WIDTH), "text.token.weight": torch.ones(3)},
        None, "CLIP, vision tower", "clip", 2,
    ),
    "SigLIP": (
        vit, {"global_pool": "map", "class_token": False},
        lambda m: under("visual.trunk.", flat(m)) | {"logit_bias": torch.ones(())},
        None, "CLIP, vision tower", "clip", 1,
    ),
    "CLIP": (vit, {"pre_norm": True}, clip_names, None, "CLIP, vision tower", "clip", 3),
    "OpenCLIP training": (
        vit, {"pre_norm": True}, lambda m: training(state_dict=under("module.", clip_names(m))),
        None, "CLIP, vision tower", "clip", 3,
    ),
    "EVA-02 CLIP": (
        eva, {"use_rot_pos_emb": True},
        lambda m: under("visual.", flat(m) | {"rope.freqs_cos": torch.ones(4)})
        | {"visual.head.weight": torch.ones(4), "text.bias": torch.ones(4)},
        None, "CLIP, vision tower", "clip", 3,
    ),
    "DINOv3": (eva, DINOV3, dinov3, None, "DINOv3", "dinov3", 4),
}  # fmt: skip
WARNED = {
    "MAE fine-tuned": "fine-tuned with labels",
    "MoCo v3 linear": r"VPT's published numbers use it \(KMnP/vpt#53\).*gated prompt paper builds",
}


def case(name, seed=1):
    make, options, file_of, which, words, source, dropped = LAYOUTS[name]
    origin = make(seed, **options)
    target = make(99, **options)  # as many classes: the file's classifier would fit
    if target.pos_embed is not None:  # fixed embeddings must arrive too
        target.pos_embed.data = torch.randn(target.pos_embed.shape)
    return origin, target, file_of(origin), which, words, source, dropped


def assert_same(target, origin, but=()):
    """Asserts that all backbone tensors except `but`, and the models' features, are the same."""
    wanted = flat(origin)
    for name, tensor in flat(target).items():
        if name not in but:
            assert torch.equal(tensor, wanted.pop(name)), name
    assert set(wanted) == set(but)
    images = torch.randn(2, 3, *target.patch_embed.img_size)
    with torch.no_grad():
        got, features = (model.forward_features(images) for model in (target, origin))
    assert features.std() > 0.1
    if but:
        torch.testing.assert_close(got, features)
    else:
        assert torch.equal(got, features)


@pytest.mark.parametrize("how", ["path", "old path", "dict"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_of_a_layout_arrives(name, how, tmp_path):
    origin, target, file, which, words, source, dropped = case(name)
    head = target.head.weight.clone()
    path = tmp_path / "file.pth.tar"
    torch.save(file, path, _use_new_zipfile_serialization=how != "old path")
    if name in WARNED:
        with pytest.warns(UserWarning, match=WARNED[name]):
            report = load_backbone(target, file if how == "dict" else path, which=which)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = load_backbone(target, file if how == "dict" else path, which=which)
    but = ("cls_token",) if name == "DINOv2 registers" else ()  # a sum, which is rounded
    assert_same(target, origin, but)
    total = len(flat(origin))
    assert (report.layout, report.loaded, report.total) == (words, total, total)
    assert len(report.dropped) == dropped
    names = {name for entry in (file, *file.values()) if isinstance(entry, dict) for name in entry}
    assert names.issuperset(report.dropped)
    assert report.missing == ("head.weight", "head.bias")
    assert target._gated_prompt_source == source
    assert torch.equal(target.head.weight, head), "a classifier must not be loaded"


@pytest.mark.parametrize("name", ["timm", "DINOv2", "timm Eva"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_safetensors_are_read_by_content(name, suffix, tmp_path):
    from safetensors.torch import save_file

    origin, target, file, *_ = case(name)
    save_file(file, tmp_path / f"model.{suffix}")
    load_backbone(target, str(tmp_path / f"model.{suffix}"))
    assert_same(target, origin)


def test_the_report_in_words():
    file = moco(vit(), vit(OTHER))
    assert str(load_backbone(vit(99, img_size=48), file)) == (
        "MoCo v3, base: 30 of 30 backbone tensors, 0 unexpected; dropped 6 (projector head); "
        "dropped 36 (momentum encoder); dropped 4 (predictor); position embeddings resampled "
        "4x4 -> 6x6"
    )
    file = {"state_dict": under("net.", flat(vit(), head=True)) | LOSS}
    assert str(load_backbone(vit(99), file)) == (
        "timm's names: 30 of 30 backbone tensors, 0 unexpected; dropped 2 (classifier); left out 2 "
        "outside 'net.' ('loss.weight', 'metric.total')"
    )
    file = {"model": flat(vit()), "model_ema": flat(vit())}
    assert load_backbone(vit(99), file).notes == (
        "the EMA weights, as timm takes them; which='raw' loads the others",
    )
    assert load_backbone(vit(99), file, which="raw").notes == (
        "the weights that are not the EMA; which='ema' loads the EMA",
    )
    assert not load_backbone(vit(99), without(file, "model")).notes
    assert str(LoadReport("a", 1, 1)) == "a: 1 of 1 backbone tensors, 0 unexpected"


def resampled(positions, old, new):
    grid = positions[0].T.reshape(1, WIDTH, *old)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)
    return grid.reshape(WIDTH, -1).T[None]


@pytest.mark.parametrize("size", [48, 16, (32, 56), (16, 64)], ids=str)
@pytest.mark.parametrize("name", ["MAE", "MoCo v3", "timm", "OpenCLIP trunk"])
def test_position_embeddings_are_resampled(name, size):
    origin, _, file, which, *_ = case(name)
    target = vit(99, img_size=size)
    if name in ("timm", "OpenCLIP trunk"):  # timm reads the file's image size here
        target.pretrained_cfg = {"input_size": (3, 32, 32)}
    report = load_backbone(target, file, which=which)
    new = target.patch_embed.grid_size
    wanted = flat(origin)["pos_embed"]
    wanted = torch.cat([wanted[:, :1], resampled(wanted[:, 1:], (4, 4), new)], dim=1)
    torch.testing.assert_close(target.pos_embed.detach(), wanted)
    assert torch.equal(target.cls_token, origin.cls_token)
    assert any("position embeddings resampled" in note for note in report.notes)


def test_patch_embedding_of_another_size_is_refused_or_told():
    refuses(vit(patch_size=16), training(model=flat(mae_vit())), "patch_embed.proj.weight must be")
    report = load_backbone(vit(99, patch_size=4), flat(vit()))
    assert "patch embedding resampled [16, 3, 8, 8] -> [16, 3, 4, 4]" in report.notes
    assert any("position embeddings resampled" in note for note in report.notes)


@pytest.mark.parametrize("name", ["MAE", "MoCo v3", "DINO"])
def test_a_model_without_a_class_position_computes_the_same(name):
    origin, _, file, which, *_ = case(name)
    target = vit(99, no_embed_class=True)
    report = load_backbone(target, file, which=which)
    assert "the class token's position embedding added to cls_token" in report.notes
    assert_same_features(target, origin)


def test_registers_in_a_model_with_positions_for_them_compute_the_same():
    origin = vit(**REGISTERS)
    target = vit(99, **{**REGISTERS, "no_embed_class": False})
    report = load_backbone(target, with_registers(origin))
    assert "zero position embeddings for the registers" in report.notes
    assert not target.pos_embed[:, 1:5].any()
    assert_same_features(target, origin)


def test_registers_are_resampled_alone_from_the_patches():
    origin = vit(**REGISTERS)
    target = vit(99, **{**REGISTERS, "img_size": 56})
    load_backbone(target, with_registers(origin))
    wanted = resampled(flat(origin)["pos_embed"], (2, 2), (4, 4))
    torch.testing.assert_close(target.pos_embed.detach(), wanted)
    assert torch.equal(target.reg_token, origin.reg_token)


def assert_same_features(target, origin):
    images = torch.randn(2, 3, *target.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(*(m.forward_features(images) for m in (target, origin)))


def test_maes_norm_becomes_the_norm_after_the_pool():
    origin, target = mae_vit(), vit(99, global_pool="avg")
    report = load_backbone(target, training(model=flat(origin)))
    assert any(note.startswith("norm -> fc_norm") for note in report.notes)
    assert torch.equal(target.fc_norm.weight, origin.norm.weight)
    assert torch.equal(target.fc_norm.bias, origin.norm.bias)
    refuses(vit(global_pool="avg"), moco(vit(), None), "needs a model built with global_pool='tok")
    refuses(
        vit(), training(model=flat(vit(global_pool="avg"), head=True)), "built with global_pool='a"
    )


def test_vit_s_of_moco_has_twelve_heads():
    options = {"embed_dim": 384, "patch_size": 16, "depth": 1}
    file = moco(vit(**options, num_heads=12), None)
    refuses(vit(**options, num_heads=6), file, "vit has 6 .*: build vit with num_heads=12")
    target = vit(99, **options, num_heads=12)
    load_backbone(target, file)
    assert_same(target, vit(**options, num_heads=12))
    load_backbone(vit(**options, num_heads=6), flat(vit(**options, num_heads=6)))


def test_float16_files_and_other_dtypes_are_converted():
    origin = mae_vit()
    halves = {name: tensor.half() for name, tensor in flat(origin).items()}
    target = vit(99).double()
    load_backbone(target, training(model=halves))
    assert all(torch.equal(target.state_dict()[n], t.double()) for n, t in halves.items())
    target = vit(99).half()
    file = training(model={n: t * 1e6 for n, t in flat(origin).items()})
    refuses(target, file, r"must be finite, got \d+ NaN or infinite elements in torch.float16")


# ---- refusals ----


def refuses(model, source, pattern, error=CheckpointError, **options):
    """Asserts the error and an unchanged model; returns the message."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load = load_official if isinstance(model, gp.GatedPromptViT) else load_backbone
    with pytest.raises(error, match=pattern) as caught:
        load(model, source, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed though the file was refused"
    assert not hasattr(model, "_gated_prompt_source")
    return str(caught.value)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_refused(name):
    _, target, file, which, *_ = case(name)
    encoder, *_ = layouts.recognise(file, which)
    entry = file[encoder.entry] if encoder.entry else file
    pattern = re.escape(encoder.prefix) + r".*(mlp\.fc1|c_fc|w12)\.bias"
    name = next(name for name in entry if re.fullmatch(pattern, name))
    saved = entry.pop(name)
    refuses(target, file, r"1 of \d+ tensors missing \('blocks\.\d", which=which)
    entry[name] = saved[:-1]
    refuses(target, file, r"blocks\.\d\S* must be \[\d+\], got \[\d+\]", which=which)
    entry[name] = saved
    entry[name.replace("bias", "surprise")] = saved
    refuses(target, file, r"1 unexpected \('blocks.*surprise'\)", which=which)


def test_an_error_counts_and_names_five():
    tensors = flat(vit())
    got = refuses(vit(depth=4), training(model=tensors), "24 of 54 tensors missing")
    assert got.count("'blocks.") == 5
    assert "0 unexpected" in got


@pytest.mark.parametrize("name", ["module.queue", "norm.weight"])
def test_a_key_outside_the_prefix_is_unexpected(name):
    file = moco(vit(), None)
    file["state_dict"][name] = torch.ones(WIDTH)
    refuses(vit(), file, rf"1 unexpected \('{name}'\)")


def test_two_tensors_for_one_place_are_refused():
    file = dino(vit(), vit())
    file["teacher"]["module.backbone.norm.bias"] = torch.ones(WIDTH)
    refuses(vit(), file, r"1 unexpected \('module.backbone.norm.bias'\)")
    file = {"teacher": under("backbone.", chunked(flat(vit(**PATCH14)) | MASK))}
    file["teacher"]["backbone.blocks.1.1.norm1.bias"] = torch.ones(WIDTH)
    refuses(vit(**PATCH14), file, "two chunks of the file contain the same block")


@pytest.mark.parametrize("shape", [(1, 12, WIDTH), (1, 1, WIDTH), (17, WIDTH), (2, 17, WIDTH)])
def test_position_embeddings_of_no_grid_are_refused(shape):
    file = {"teacher": under("backbone.", flat(vit()) | {"pos_embed": torch.ones(shape)})}
    refuses(vit(99), file, r"pos_embed must be \[1, 1 \+ patches, D\] of a square or 4x4 grid")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_are_refused_by_name_unless_allowed(value):
    tensors = flat(vit())
    tensors["blocks.1.norm2.weight"][3] = value
    refuses(vit(99), training(model=tensors), "blocks.1.norm2.weight must be finite, got 1 NaN or")
    target = vit(99)
    load_backbone(target, training(model=tensors), allow_nonfinite=True)
    assert torch.equal(target.blocks[1].norm2.weight[3].isfinite(), torch.tensor(False))


def test_values_that_are_no_weights_are_refused():
    tensors = flat(vit())
    tensors["norm.bias"] = torch.ones(WIDTH, dtype=torch.int8)
    refuses(vit(99), training(model=tensors), "norm.bias must be floating, got torch.int8")
    tensors["norm.bias"] = [0.0] * WIDTH
    refuses(vit(99), training(model=tensors), "'norm.bias' must be a tensor, got list")


@pytest.mark.parametrize(
    ("make", "which", "pattern"),
    [
        (lambda: moco(vit(), None), "momentum", r"one of \('base',\) .*got 'momentum'"),
        (lambda: moco(None, vit()), None, r"one of \('momentum',\) .*got None, which means 'base'"),
        (lambda: moco(vit(), vit()), "teacher", r"one of \('base', 'momentum'\) .*got 'teacher'"),
        (lambda: moco(None, None), None, "a ViT has patch_embed.proj.weight and blocks"),
        (lambda: training(state_dict=under("module.", flat(vit(), True))), "base", "must be None"),
        (
            lambda: without(dino(vit(), vit()), "teacher"),
            None,
            r"one of \('student',\) .*'teacher'",
        ),
        (lambda: without(dino(vit(), vit()), "student"), "student", r"one of \('teacher',\)"),
        (lambda: {"teacher": DINO_HEAD, "student": DINO_HEAD}, None, "a ViT has patch_embed"),
        (lambda: without(ijepa(*[vit(**NO_CLASS)] * 2), "target_encoder"), "target", "must be N"),
        (lambda: ijepa(*[vit(**NO_CLASS)] * 2), "raw", r"one of \('target', 'encoder'\) .*'raw'"),
        (lambda: {"model": flat(vit()), "model_ema": flat(vit())}, "x", r"one of \('ema', 'raw'\)"),
        (lambda: {"state_dict": flat(vit())}, "raw", "must be None for a file of one encoder"),
        (lambda: flat(vit()), "base", "must be None for a file of one encoder .*got 'base'"),
    ],
)
def test_a_file_without_the_encoder_asks_which(make, which, pattern):
    refuses(vit(99), make(), pattern, ValueError, which=which)


TWO = {  # choices: a file of these models
    ("student", "teacher"):
        lambda a, b: {"state_dict": under("student.", a) | under("teacher.", b)},
    ("module.net", "module.ema"): lambda a, b: under("module.net.", a) | under("module.ema.", b),
    ("", "teacher.vit"): lambda a, b: {"model": a | under("teacher.vit.", b)},
    ("model", "state_dict"): lambda a, b: {"model": a, "state_dict": b},
    ("teacher", "net"): lambda a, b: {"teacher": a, "net": b},
    ("model_ema", "ema"): lambda a, b: {"model_ema": a, "ema": b},
    ("model/net", "model_2/net"):
        lambda a, b: {"model": under("net.", a), "model_2": under("net.", b)},
}  # fmt: skip


@pytest.mark.parametrize("choices", TWO, ids=str)
def test_of_two_encoders_the_caller_is_asked(choices):
    origins = vit(), vit(OTHER)
    file = TWO[choices](*map(flat, origins))
    pattern = re.escape(f"which must be one of {choices} for this file (timm's names), got None")
    refuses(vit(99), file, pattern + "$", ValueError)
    refuses(vit(99), file, "got 'vit'", ValueError, which="vit")
    for which, origin in zip(choices, origins, strict=True):
        target = vit(99)
        report = load_backbone(target, file, which=which)
        assert report.layout == f"timm's names, {which}"
        assert len(report.dropped) in (0, 30)
        assert all(note.startswith("left out 30 outside '") for note in report.notes)
        assert_same(target, origin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("side", "width"), [(2, 16), (14, 384)])
def test_positions_prove_a_layout_in_any_dtype(dtype, side, width):
    options = {"img_size": 8 * side, "embed_dim": width, "depth": 1, "num_heads": 4}
    for make, kind, head, source in (
        (mae_vit, "MAE", False, "mae"), (mae_vit, "MAE", True, "timm"),
        (moco_vit, "MoCo v3", False, "mocov3"), (moco_vit, "MoCo v3", True, "mocov3"),
    ):  # fmt: skip
        file = {n: t.to(dtype) for n, t in flat(make(**options), head).items()}
        target = vit(99, **{**options, "num_heads": 12 if kind == "MoCo v3" and width > 16 else 4})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_backbone(target, file)
        assert target._gated_prompt_source == source, (kind, head)


def positions_changed(at, by):
    positions = fixed_positions("MAE", 4)
    positions[at] += by
    return positions


@pytest.mark.parametrize(
    "positions",
    [
        positions_changed((0, 5, 3), 1e-3), positions_changed((0, 0, 0), 1e-3),
        positions_changed((0, 5, 3), math.nan), -fixed_positions("MAE", 4),
        fixed_positions("MAE", 4).flip(1), torch.zeros(1, 17, WIDTH),
    ],
)  # fmt: skip
def test_positions_that_were_trained_prove_nothing(positions):
    file = {"model": flat(vit()) | {"pos_embed": positions}}
    target = vit(99)
    load_backbone(target, file, allow_nonfinite=True)
    assert target._gated_prompt_source == "timm"
    assert gp.wrap(target, num_prompts=2).pool == "cls"


@pytest.mark.parametrize("side", [0, 1])
def test_a_grid_of_one_patch_proves_nothing(side):
    target = vit(99, img_size=8)
    positions = fixed_positions("MAE", 1)
    assert torch.equal(positions, fixed_positions("MoCo v3", 1))
    file = flat(vit(img_size=8)) | {"pos_embed": positions[:, : 1 + side]}
    if side:
        load_backbone(target, file)
        assert target._gated_prompt_source == "timm"
    else:
        refuses(target, file, "pos_embed must be|timm can't convert")


@pytest.mark.parametrize(
    "args",
    [
        None, vars(FINETUNING), argparse.Namespace(**{**vars(FINETUNING), "finetune": ""}),
        *(argparse.Namespace(**{k: v for k, v in vars(FINETUNING).items() if k != left_out})
          for left_out in vars(FINETUNING)),
    ],
    ids=str,
)  # fmt: skip
def test_mae_fine_tuned_is_proved_by_the_arguments_of_its_script(args):
    tuned = vit(99, global_pool="avg")
    file = training(model=flat(vit(global_pool="avg"), head=True), args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(tuned, file)
    assert tuned._gated_prompt_source == "timm"
    assert gp.wrap(tuned, num_prompts=2).pool == "patch"


def test_a_supervised_vit_s_of_six_heads_saved_under_ddp_loads():
    options = {"embed_dim": 384, "patch_size": 16, "depth": 1, "num_heads": 6}
    origin, target = vit(**options), vit(99, **options)
    load_backbone(target, training(state_dict=under("module.", flat(origin, head=True))))
    assert_same(target, origin)
    file = training(state_dict=under("module.", flat(moco_vit(**options), head=True)))
    refuses(vit(**options), file, "vit has 6 .*: build vit with num_heads=12")


@pytest.mark.parametrize("make", [vit, mae_vit])
def test_an_rgb_file_is_adapted_to_other_channels(make):
    origin = make()
    weight = origin.patch_embed.proj.weight
    wanted = {
        1: weight.sum(dim=1, keepdim=True), 2: weight[:, :2] * 1.5,
        4: weight[:, [0, 1, 2, 0]] * 0.75,
    }  # fmt: skip
    for channels, tensor in wanted.items():
        target = vit(99, in_chans=channels)
        report = load_backbone(target, {"model": flat(origin)})
        torch.testing.assert_close(target.patch_embed.proj.weight, tensor)
        note = f"patch embedding adapted from 3 input channels to {channels}"
        assert note in report.notes
    target = vit(99, in_chans=1)
    load_backbone(target, {"model": flat(origin)})
    gray = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        got, features = (
            target.forward_features(gray),
            origin.forward_features(gray.repeat(1, 3, 1, 1)),
        )
    torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-4)
    model = create_backbone(
        "vit_tiny_patch16_224", checkpoint=flat(origin), in_chans=1, img_size=32, patch_size=8,
        embed_dim=WIDTH, depth=2, num_heads=2,
    )  # fmt: skip
    assert torch.equal(model.patch_embed.proj.weight, target.patch_embed.proj.weight)


@pytest.mark.parametrize(("file", "model"), [(1, 3), (4, 3), (4, 1), (1, 2)])
def test_other_channels_are_refused(file, model):
    pattern = rf"must have {model} input channels?,.* got {file}: build vit with in_chans={file}"
    refuses(vit(in_chans=model), flat(vit(in_chans=file)), pattern)
    target = vit(99, in_chans=file)
    load_backbone(target, flat(vit(in_chans=file)))
    assert torch.equal(target.patch_embed.proj.weight, vit(in_chans=file).patch_embed.proj.weight)


@pytest.mark.parametrize(
    "file",
    [{}, {"model": {}}, {"a\x1b[31m": torch.ones(1)}, {3: torch.ones(1)}, {"model": [1, 2]},
     {"vit.embeddings.cls_token": torch.ones(1)}],
    ids=str,
)  # fmt: skip
def test_unknown_layouts_are_refused_with_their_keys(file):
    got = refuses(vit(99), file, "the file's . keys fit no known layout")
    assert "\x1b" not in got


def test_models_that_cannot_be_loaded_into():
    model = gp.wrap(vit(), num_prompts=2)
    for wrapped in (model, model.backbone):
        with pytest.raises(RuntimeError, match="vit is wrapped; load its backbone before wrap"):
            load_backbone(wrapped, flat(vit()))
    with pytest.raises(TypeError, match=r"vit must be a timm .*got torch.nn.*Linear"):
        load_backbone(nn.Linear(2, 2), flat(vit()))
    with torch.device("meta"):
        hollow = VisionTransformer(embed_dim=WIDTH, depth=1, num_heads=2, **GRID)
    with pytest.raises(RuntimeError, match="vit is on the meta device"):
        load_backbone(hollow, flat(vit()))


def test_dinov3_bias_that_the_model_has_not_must_be_zero():
    file = dinov3(eva(**DINOV3))
    file["blocks.1.attn.qkv.bias"][2] = 1.0
    refuses(eva(99, **DINOV3), file, "qkv.bias' is not zero, but the model has no .*_qkvb")
    biased = {**DINOV3, "qkv_bias": True}
    target = eva(99, **biased)
    load_backbone(target, file)
    assert target.blocks[1].attn.q_bias[2] == 1.0


# ---- reading ----


def test_missing_files_directories_and_rights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_checkpoint(tmp_path / "pipe")
    with pytest.raises(TypeError, match="path must be a str or PathLike, got int"):
        read_checkpoint(3)
    locked = tmp_path / "locked.pth"
    locked.write_bytes(b"x")
    locked.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root can read every file
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=r"locked.pth"):
            read_checkpoint(locked)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "'.*f' is empty"),
        (b"<!DOCTYPE html><html>", "not a checkpoint, starts with '<!DOCTYPE"),
        (b"version https://git-lfs", "not a checkpoint, starts with 'version"),
        (b"\x1b[31m\x1b]0;owned\x07", r"not a checkpoint, starts with '\\x1b\[31m"),
        (b"PK\x03\x04" + bytes(40), "truncated or damaged"),
        (b"\x80\x02", "truncated or damaged"),
        (b"\x80\x02}q\x00.", "a raw pickle, not a torch.save file"),
        (b"\x93NUMPY\x01\x00", "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(content, pattern, tmp_path):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_checkpoint(tmp_path / "f")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_every_truncation_is_refused(new_format, tmp_path):
    path = tmp_path / "f.pth"
    torch.save(training(model=flat(vit())), path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    for size in [*range(1, 200, 13), *range(200, len(content) - 1, len(content) // 40)]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert "weights_only" not in str(caught.value)
        assert str(caught.value)[-1] != ":"


def test_flipped_bytes_never_escape_as_other_errors(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, path)
    content = path.read_bytes()
    refused = []
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            refused.append(error)
    assert len(refused) > 20
    assert not any("weights_only" in str(error) or error.__cause__ for error in refused)


class Call:
    """Pickles as a function call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class State:
    def __setstate__(self, state):
        open(state, "w").close()

    def __reduce__(self):
        return (State, (), self.path)


def text(module, name, argument, opcode="R"):
    """Returns a hand-written pickle that makes a call by the given opcode."""
    argument = pickle.dumps(argument, 0)[:-1]
    module, name = module.encode(), name.encode()
    if opcode == "i":
        return b"(" + argument + b"i" + module + b"\n" + name + b"\n."
    if opcode == "o":
        return b"(c" + module + b"\n" + name + b"\n" + argument + b"o."
    if opcode == "stack":
        strings = b"".join(b"\x8c" + bytes([len(s)]) + s for s in (module, name))
        return b"\x80\x04" + strings + b"\x93" + b"(" + argument + b"tR."
    return b"\x80\x02c" + module + b"\n" + name + b"\n(" + argument + b"tR."


def state_payload(canary):
    state = State()
    state.path = canary
    return pickle.dumps(state, 2)


PAYLOADS = {  # each makes the file `canary` when it is unpickled
    "os.system": lambda c: pickle.dumps(Call(os.system, f"touch {c}"), 2),
    "subprocess": lambda c: pickle.dumps(Call(subprocess.check_call, ["touch", c]), 2),
    "eval": lambda c: pickle.dumps(Call(eval, f"open({c!r}, 'w').close()"), 2),
    "exec": lambda c: pickle.dumps(Call(exec, f"open({c!r}, 'w').close()"), 2),
    "open": lambda c: pickle.dumps(Call(open, c, "w"), 2),
    "protocol 4": lambda c: pickle.dumps(Call(os.system, f"touch {c}"), 4),
    "stack global": lambda c: text("os", "system", f"touch {c}", "stack"),
    "inst": lambda c: text("os", "system", f"touch {c}", "i"),
    "obj": lambda c: text("os", "system", f"touch {c}", "o"),
    "partial": lambda c: pickle.dumps(Call(functools.partial(os.system, f"touch {c}")), 2),
    "timeit": lambda c: pickle.dumps(Call(timeit.timeit, f"open({c!r}, 'w')", "pass",
                                          timeit.default_timer, 1), 2),
    "setstate": state_payload,
    "getattr": lambda c: pickle.dumps(Call(os.mkdir, c), 2),
    "in a dict": lambda c: pickle.dumps({"model": {"a": Call(os.mkdir, c)}}, 2),
    "runpy": lambda c: pickle.dumps(Call(runpy.run_path, c + ".py"), 2),
}  # fmt: skip


def as_zip(path, payload, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in records:
            archive.writestr(f"archive/{name}", content)


def as_legacy(path, payload):
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    content = b"".join(pickle.dumps(value, 2) for value in header)
    path.write_bytes(content + payload + pickle.dumps([], 2))


FORMATS = {"zip": as_zip, "legacy": as_legacy, "raw": lambda path, p: path.write_bytes(p)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", PAYLOADS)
def test_code_in_a_pickle_never_runs_and_is_named(kind, form, tmp_path):
    canary = str(tmp_path / "canary")
    (tmp_path / "canary.py").write_text(f"open({canary!r}, 'w').close()")
    payload = PAYLOADS[kind](canary)
    pickle.loads(payload)
    assert os.path.exists(canary), "the payload must work, or the test shows nothing"
    os.rmdir(canary) if os.path.isdir(canary) else os.remove(canary)
    path = tmp_path / "f.pth"
    FORMATS[form](path, payload)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(vit(), path)
    assert not os.path.exists(canary), "the payload ran"
    message = str(caught.value)
    if form == "raw" and not payload.startswith(b"\x80"):
        assert "is not a checkpoint, starts with" in message
    else:
        assert re.search(r"unpickling it would use '[\w.]+'", message), message
    assert "weights_only" not in message


BOMBS = {
    "bytearray": text("builtins", "bytearray", 10**12),
    "torch.Tensor": pickle.dumps(Call(torch.Tensor, 10**6, 10**6), 2),
    "UntypedStorage": text("torch.storage", "UntypedStorage", 10**12),
    "FloatTensor": text("torch", "FloatTensor", 10**12),
    "extension": b"\x80\x02\x82\x01.",
    "object dtype": text("numpy.core.multiarray", "scalar", 1),
    "cyclic": b"\x80\x02]q\x00h\x00a.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "list": pickle.dumps([1, 2], 2),
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("kind", BOMBS)
def test_pickles_that_reserve_memory_are_refused(kind, form, tmp_path):
    FORMATS[form](tmp_path / "f.pth", BOMBS[kind])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "f.pth")
    reserves = kind in ("bytearray", "torch.Tensor", "UntypedStorage", "FloatTensor", "extension")
    assert ("unpickling it would use" in str(caught.value)) == reserves


def storage(elements, shape=(2,), stride=(1,), end=b""):
    """Returns the pickle of {"a": a tensor} as torch.save writes it, with the given sizes."""

    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    def name(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    elements = elements if isinstance(elements, bytes) else number(elements)
    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    return (
        b"\x80\x02}" + name("a") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + name("storage")
        + b"ctorch\nFloatStorage\n" + name("0") + name("cpu") + elements + end + b"tQ"
        + number(0) + numbers[0] + numbers[1] + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path):
    path = tmp_path / "f.pth"
    data = ("data/0", struct.pack("<2f", 1, 2))
    as_zip(path, storage(2), [data])
    assert read_checkpoint(path)["a"].tolist() == [1, 2]  # the hand-written file is valid
    for elements, shape, stride, pattern in (
        (10**12, (2,), (1,), "declares 1000000000000 elements, the file has"),
        (10**12, (10**12,), (1,), "declares 1000000000000 elements, the file has"),
        (2, (10**12,), (1,), "truncated or damaged"),
        (2, (10**6, 10**6), (0, 0), r"tensor 'a' \[1000000, 1000000\] declares 4000000000000"),
        (2, (-1,), (1,), "truncated or damaged"),
        (-1, (2,), (1,), "truncated or damaged"),
    ):
        as_zip(path, storage(elements, shape, stride), [data])
        with pytest.raises(CheckpointError, match=pattern):
            read_checkpoint(path)
    as_legacy(path, storage(10**12, end=b"N"))
    with pytest.raises(CheckpointError, match="declares 1000000000000 elements"):
        read_checkpoint(path)
    big = b"\x8a\x08" + struct.pack("<q", 10**12)
    for elements, end in (
        (b"h\x02", b"N"), (big, b"K\x05"), (big + b"K\x050", b"N"), (big, b"N0N"), (big, b""),
        (b"K\x05(" + big + b"l0" + big, b"N"), (b"", b"h\x00N"), (b"J\xff\xff\xff\xff", b"N"),
    ):  # fmt: skip
        # the count that torch would use is not where torch.save writes it
        as_legacy(path, storage(elements, end=end))
        with pytest.raises(CheckpointError, match=r"not named as torch.save|declares 10000000"):
            read_checkpoint(path)


def test_zip_bombs_are_refused_by_their_directory(tmp_path):
    path = tmp_path / "f.pth"
    as_zip(path, storage(2), [("data/0", bytes(10**7))], zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"record 'archive/.*' is compressed"):
        read_checkpoint(path)
    as_zip(path, storage(2), [("data/0", bytes(8))])
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")  # the last directory entry: data/0
    huge = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content[: entry + 20] + huge + content[entry + 28 :])
    with pytest.raises(CheckpointError, match=r"its records declare 2147.* bytes, the file has"):
        read_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        as_zip(path, storage(2), [("data/0", bytes(8)), ("DATA.PKL", BOMBS["bytearray"])])
    with pytest.raises(CheckpointError, match="two of its records have the same name"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(CheckpointError, match=r"is a zip archive, not a torch.save file"):
        read_checkpoint(path)
    as_zip(path, storage(2), [("constants.pkl", b"")])
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which holds code"):
        read_checkpoint(path)


def test_a_file_beyond_twice_the_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "f.pth"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(checkpoint_file, "_MAX_FILE", 100)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes; at most 100 and twice the memory"):
        read_checkpoint(path)


def safetensors_file(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)


def tensor(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": tensor(0, 8)}, bytes(8), 2**40),
        ({"a": tensor(0, 8)}, bytes(8), 5),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12), None),
        ({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20), None),
        ({"a": tensor(0, 8, shape=(2**62, 2**62))}, bytes(8), None),
        ({"a": tensor(0, 8, shape=(2**40,))}, bytes(8), None),
        ({"a": tensor(0, 8, "F33")}, bytes(8), None),
        ({"a": tensor(0, 8)}, bytes(9), None),
        ({"a": tensor(0, 8)}, bytes(7), None),
        ({"a": tensor(8, 0)}, bytes(8), None),
        (b"{not json", b"", None),
        (b"{\xff\xfe", b"", None),
    ],
)
def test_faults_of_safetensors_get_the_librarys_reason(header, data, length, tmp_path):
    path = tmp_path / "f.safetensors"
    safetensors_file(path, {"a": tensor(0, 8)}, bytes(8))
    assert read_checkpoint(path)["a"].tolist() == [0, 0]
    safetensors_file(path, header, data, length)
    with pytest.raises(CheckpointError, match=r"truncated or damaged: .*\w{4}"):
        read_checkpoint(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_inert_values_of_training_files_load(new_format, tmp_path):
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "f.pth"
    file = training(
        model={"a": torch.arange(3.0)}, best=numpy.float64(0.5), step=numpy.int64(3),
        rng=numpy.arange(4), names={"x"}, defaults=collections.OrderedDict(a=torch.float16),
        size=torch.Size([2]), device=torch.device("cpu"), count=collections.Counter("aab"),
        more=[torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.int64, torch.bool)],
    )  # fmt: skip
    torch.save(file, path, _use_new_zipfile_serialization=new_format)
    got = read_checkpoint(path)
    assert torch.equal(got["model"]["a"], torch.arange(3.0))
    assert got["args"].lr == 1.5e-4
    assert got["count"] == {"a": 2, "b": 1}
    assert type(got["best"]).__name__ == type(got["rng"]).__name__ == "_Ignored"
    allowed = torch.serialization.get_safe_globals()
    assert argparse.Namespace not in allowed, "the allow list must not outlive the call"
    assert not any(isinstance(entry, tuple) for entry in allowed)


def test_numpys_older_names_load(tmp_path):
    old = pickle.dumps({"best": pytest.importorskip("numpy").float64(0.5)}, 2)
    as_zip(tmp_path / "f", old.replace(b"numpy._core", b"numpy.core"))
    assert type(read_checkpoint(tmp_path / "f")["best"]).__name__ == "_Ignored"


def test_a_flipped_bit_is_seen_with_the_digest(tmp_path):
    path = tmp_path / "f.pth"
    torch.save(flat(vit()), path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for given in (digest, digest.upper()):
        target = vit(99)
        load_backbone(target, path, expect_sha256=given)
        assert_same(target, vit())
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.write_bytes(damaged)
    load_backbone(vit(99), path)  # not noticed without expect_sha256
    refuses(vit(99), path, f"SHA-256 must be {digest}, got [0-9a-f]+", expect_sha256=digest)
    refuses(vit(99), flat(vit()), "needs a path, got a dict", ValueError, expect_sha256=digest)
    with pytest.raises(ValueError, match="expect_sha256 must be 64 hexadecimal digits, got 'abc'"):
        read_checkpoint(path, expect_sha256="abc")


# ---- by name ----


def test_unknown_names_get_near_ones():
    with pytest.raises(ValueError, match=r"got 'vit_bas_patch16_224'; near: .*vit_base_patch16_22"):
        create_backbone("vit_bas_patch16_224")
    with pytest.raises(ValueError, match=r"got 'vit_base_patch16_224.moe'; near: .*\.mae"):
        create_backbone("vit_base_patch16_224.moe")
    with pytest.raises(ValueError, match=r"got 'hf-hub:a/b'"):
        create_backbone("hf-hub:a/b")
    with pytest.raises(TypeError, match=r"must be a timm VisionTransformer or Eva, got .*ResNet"):
        create_backbone("resnet10t")
    with pytest.raises(ValueError, match="give checkpoint or pretrained=True, got both"):
        create_backbone("vit_tiny_patch16_224", pretrained=True, checkpoint="x")
    with pytest.raises(ValueError, match="which='base' needs a checkpoint, got None"):
        create_backbone("vit_tiny_patch16_224", which="base")


def test_a_backbone_by_name_with_a_checkpoint(tmp_path):
    options = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "patch_size": 8}
    torch.save(moco(vit(OTHER), vit()), tmp_path / "f")
    model = create_backbone(
        "vit_tiny_patch16_224", checkpoint=tmp_path / "f", which="momentum", img_size=32, **options
    )
    assert_same(model.eval(), vit())
    assert model._gated_prompt_source == "mocov3"
    assert model.num_classes == 0
    assert gp.wrap(model, num_prompts=2).pool == "cls"


def test_a_mae_file_gives_the_papers_pool():
    target = vit(99)
    load_backbone(target, training(model=flat(mae_vit())))
    assert gp.wrap(target, num_prompts=2).pool == "prompt+patch"
    tuned = vit(99, global_pool="avg")
    file = training(model=flat(vit(global_pool="avg"), head=True), args=FINETUNING)
    with pytest.warns(UserWarning, match="fine-tuned"):
        load_backbone(tuned, file)
    assert gp.wrap(tuned, num_prompts=2).pool == "patch"


# ---- tuned checkpoints of the original project ----

PROMPTS, CLASSES = 3, 5


def wrapped(seed=99, method="gpt", **options):
    backbone = vit(seed, num_classes=CLASSES)
    model = gp.wrap(backbone, method, num_prompts=PROMPTS, pool="cls", **options)
    return randomised(model, seed)


def official(model, prefix="enc.", backbone=True):
    """Returns our model's tensors under the keys of the original project."""
    file = {f"{prefix}prompt_embeddings": model.prompts.tokens[None]}
    if model.gates:
        file[f"{prefix}gate_logit"] = torch.stack([gate.logit for gate in model.gates]).flatten()
    if model.temperatures:
        file[f"{prefix}temp"] = torch.stack(list(model.temperatures)).flatten()
    if getattr(model, "deep_prompts", None) is not None:
        file[f"{prefix}deep_prompt_embeddings"] = model.deep_prompts.tokens
    if backbone:
        names = renamed(model.backbone.state_dict(), (r"(blocks\.\d+\.attn)\.attn\.", r"\1."))
        file |= under(prefix, {n: t for n, t in names.items()
                               if not re.match("head|.*temperature", n)})  # fmt: skip
    head = prefix.removesuffix("enc.")
    file[f"{head}head.last_layer.weight"] = model.head.weight
    file[f"{head}head.last_layer.bias"] = model.head.bias
    return {name: tensor.detach().clone() for name, tensor in file.items()}


def assert_same_model(model, origin, backbone=True):
    wanted = origin.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone.head.") or (
            not backbone and name.startswith("backbone.") and "temperature" not in name
        ):
            continue
        assert torch.equal(tensor, wanted[name]), name
    if backbone:
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model.eval()(images), origin.eval()(images))


@pytest.mark.parametrize("prefix", ["", "enc.", "module.", "module.enc."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_a_tuned_checkpoint_of_the_original_arrives(prefix, entry, tmp_path):
    origin, model = wrapped(1), wrapped()
    file = official(origin, prefix)
    torch.save({entry: file, "epoch": 3} if entry else file, tmp_path / "f.pth")
    report = load_official(model, tmp_path / "f.pth")
    assert_same_model(model, origin)
    assert str(report) == (
        "tuned checkpoint of the original project: 35 of 35 tensors, 0 unexpected; no "
        "deep_prompt_embeddings, and the model has none; 30 backbone tensors, 30 of them different "
        "from the model's"
    )


def test_gate_logits_keep_their_sign_and_order():
    model = wrapped(gated_blocks=2)
    file = official(wrapped(1, gated_blocks=2))
    file["enc.gate_logit"] = torch.tensor([-5.0, 2.0])
    file["enc.temp"] = torch.tensor([0.5, 3.0])
    load_official(model, file)
    assert [gate.logit.item() for gate in model.gates] == [-5.0, 2.0]
    assert [t.item() for t in model.temperatures] == [0.5, 3.0]


def test_the_backbone_of_a_tuned_checkpoint_may_be_absent_or_known():
    origin, model = wrapped(1), wrapped()
    report = load_official(model, official(origin, backbone=False))
    assert "no backbone in the file; the model's is kept" in report.notes
    assert_same_model(model, origin, backbone=False)
    report = load_official(wrapped(1), official(origin))
    assert "30 backbone tensors, 0 of them different from the model's" in report.notes


def test_deep_prompts_of_the_original_arrive():
    origin, model = wrapped(1, "vpt-deep"), wrapped(99, "vpt-deep")
    file = official(origin) | {"enc.temp": torch.ones(2), "enc.gate_logit": torch.ones(1)}
    report = load_official(model, file)
    assert_same_model(model, origin)
    assert report.dropped == ("gate_logit", "temp")
    refuses(model, without(file, "enc.deep_prompt_embeddings"), "deep_prompt_embeddings is missing")
    file["enc.deep_prompt_embeddings"] = torch.ones(2, PROMPTS, WIDTH)
    refuses(model, file, r"deep_prompt_embeddings must be \[1, 3, 16\], got \[2, 3, 16\]")
    refuses(wrapped(), file, r"deep_prompt_embeddings must be absent")


@pytest.mark.parametrize("method", ["vpt-shallow", "linear"])
def test_parts_that_the_model_has_not_may_be_absent(method):
    origin, model = wrapped(1, "vpt-shallow"), wrapped(99, method)
    file = official(origin)
    if method == "linear":
        refuses(model, file, r"prompt_embeddings must be absent, .*got \[1, 3, 16\]")
        del file["enc.prompt_embeddings"]
    report = load_official(model, file)
    assert "no gate_logit, and the model has none" in report.notes
    assert "no temp, and the model has none" in report.notes
    assert torch.equal(model.head.weight, origin.head.weight)
    assert torch.equal(model.backbone.norm.bias, origin.backbone.norm.bias)


def shaped(key, *shape):
    return lambda file: file | {key: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (shaped("enc.prompt_embeddings", 1, 4, WIDTH), r"prompt_embeddings must be \[1, 3, 16\], "
         r"got \[1, 4, 16\]"),
        (shaped("enc.prompt_embeddings", 1, 3, 8), r"must be \[1, 3, 16\], got \[1, 3, 8\]"),
        (shaped("enc.gate_logit", 11), r"gate_logit must be \[1\], got \[11\]"),
        (shaped("enc.temp", 12), r"temp must be \[2\], got \[12\]"),
        (shaped("head.last_layer.weight", 7, WIDTH), r"must be \[5, 16\], got \[7, 16\]"),
        (shaped("head.last_layer.bias", 7), r"last_layer.bias must be \[5\], got \[7\]"),
        (shaped("enc.norm.bias", 7), r"norm.bias must be \[16\], got \[7\]"),
        (shaped("enc.blocks.2.norm1.bias", 7), r"backbone: .* 1 unexpected \('blocks.2.norm1"),
        (shaped("head.projection.0.bias", 7), r"1 unexpected \('head.projection.0.bias'\)"),
        (shaped("prompt_embeddings", 1, 3, WIDTH), "must contain only the tensors of one model"),
        (lambda f: without(f, "enc.gate_logit"), r"gate_logit is missing .* \[1\] \(.*save_prompt"),
        (lambda f: without(f, "enc.temp"), r"temp is missing and the model needs \[2\]"),
        (lambda f: without(f, "enc.prompt_embeddings"), r"prompt_embeddings is missing"),
        (lambda f: without(f, "head.last_layer.bias"), "head.last_layer.bias is missing"),
        (lambda f: without(f, "enc.blocks.0.attn.qkv.bias"), r"1 of 30 tensors missing"),
        (lambda f: f | {"enc.temp": torch.full((2,), float("nan"))}, r"temp\[0\] must be finite"),
        (lambda f: {"shallow_prompt": torch.ones(1)}, "neither prompt_embeddings nor head"),
        (lambda f: f | {"epoch": 3}, "must contain only the tensors of one model"),
    ],
)  # fmt: skip
def test_a_tuned_checkpoint_that_differs_is_refused_whole(change, pattern):
    refuses(wrapped(), change(official(wrapped(1))), pattern)


def test_models_of_another_kind_cannot_take_the_originals_checkpoint():
    file = official(wrapped(1))
    refuses(wrapped(gate="channel"), file, "gates are 'scalar' with rule 'mix'", RuntimeError)
    refuses(wrapped(rule="residual"), file, "the model's are 'scalar' with 'resid", RuntimeError)
    refuses(wrapped(prompt_position="end"), file, "at the start, got 'end'", RuntimeError)
    refuses(wrapped(temperature=False), file, "temp must be absent")
    refuses(wrapped(gated_blocks=0), file, "gate_logit must be absent")
    with pytest.raises(TypeError, match="model must be what wrap returned, got VisionTransformer"):
        load_official(vit(), file)


def test_loading_imports_no_more_than_timm_and_safetensors():
    code = (
        "import gated_prompt.vit.backbones, sys; print({'xformers', 'sklearn'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
