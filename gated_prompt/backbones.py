# SPDX-License-Identifier: Apache-2.0
"""Backbones from checkpoint files, by a table of key layouts.

Every layout that is read stands in `LAYOUTS`. A file is loaded completely or not at all: what is
left out of it is a known part (a decoder, a projector, a classifier) and is named in the report.
"""

from __future__ import annotations

import collections
import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from gated_prompt.checkpoint import CheckpointError, first_names, read_checkpoint
from gated_prompt.vit import GatedPromptViT

_log = logging.getLogger(__name__)


def _by_timm(tensors: dict, vit: nn.Module, notes: list) -> dict:
    """The converter of the model's family in timm, told which tensors it resampled."""
    if isinstance(vit, eva.Eva):
        no_bias = not any(name.endswith("attn.q_bias") for name in vit.state_dict())
        for name in [n for n in tensors if "storage_tokens" in tensors and n.endswith("qkv.bias")]:
            if no_bias and tensors.pop(name).any():
                raise CheckpointError(
                    f"load_backbone: {name!r} is not zero and the model has none: build timm's "
                    "model of this size with '_qkvb' in its name"
                )
        convert, options = eva.checkpoint_filter_fn, {}
    else:
        convert, options = vision_transformer.checkpoint_filter_fn, {"adapt_layer_scale": True}
    try:
        converted = convert(dict(tensors), vit, **options)
    except Exception as error:
        raise CheckpointError(
            f"load_backbone: timm can't convert the file for {type(vit).__name__}: {error}"
        ) from error
    for words, new, pattern in (
        ("position embeddings", "pos_embed", r".*(pos_embed|positional_embedding)"),
        ("patch embedding", "patch_embed.proj.weight", r".*(conv1|patch_embed\.proj)\.weight"),
    ):
        old = [value for name, value in tensors.items() if re.fullmatch(pattern, name)]
        if old and new in converted and converted[new].data_ptr() != old[0].data_ptr():
            notes.append(f"{words} resampled {list(old[0].shape)} -> {list(converted[new].shape)}")
    return converted


def _dinov2(tensors: dict, vit: nn.Module, notes: list) -> dict:
    """DINOv2's names: blocks in chunks (blocks.0.N.), a packed SwiGLU, registers."""
    renames = (
        (r"^blocks\.\d+\.(?=\d+\.)", "blocks."),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"^register_tokens$", "reg_token"),
    )
    state = tensors
    for old, new in renames:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    if len(state) < len(tensors):
        raise CheckpointError("load_backbone: two chunks of the file hold one block")
    return state


@dataclass(frozen=True)
class _Layout:
    """A key layout. Patterns are matched at the start of a key of the entry.

    Attributes:
        words, source: Its name for the reader, and for the attribute on the model.
        entries: Where in the file the tensors may be; "" is the file itself.
        signs, absent: Some key matches each of `signs`; no key matches `absent`.
        prefix: Taken off the keys that are kept; a key without it is unexpected.
        drops: (pattern, words) of what is left out.
        which: The choice that asks for it, where a file holds several encoders.
        warning: Said when it is loaded.
        convert: (tensors, vit, notes) -> tensors in timm's names; None: they have them.
    """

    words: str
    source: str
    entries: tuple[str, ...]
    signs: tuple[str, ...]
    absent: str = "$."
    prefix: str = ""
    drops: tuple[tuple[str, str], ...] = ()
    which: str | None = None
    warning: str | None = None
    convert: Callable[[dict, nn.Module, list], dict] | None = None

    def matches(self, names) -> bool:
        names = [name for name in names if isinstance(name, str)]
        found = all(any(re.match(sign, name) for name in names) for sign in self.signs)
        return found and not any(re.match(self.absent, name) for name in names)


_CLASSIFIER = (r"(.*\.)?(head(_dist)?|pre_logits)\.", "classifier")
_MASK = (r"(.*\.)?(mask_token$|lm_head\.)", "masked-image parts")
_ROTARY = (r".*(rope.*\.(freqs_cos|freqs_sin|periods)|bias_mask)$|local_cls_norm\.", "constants")
_TOWER = r"(module\.)?visual\.(trunk\.)?"


def _moco(which: str, other: str) -> _Layout:
    prefix = rf"module\.{which}_encoder\."
    drops = (
        (prefix + r"head\.", "projector head"),
        (rf"module\.{other}_encoder\.", f"{other} encoder"),
        (r"module\.predictor\.", "predictor"),
    )
    words = f"MoCo v3, {which} encoder"
    return _Layout(words, "mocov3", ("state_dict",), (prefix,), "$.", prefix, drops, which)


def _dino(words: str, which: str) -> _Layout:
    prefix = r"(module\.)?backbone\."
    mask = prefix + "mask_token$"
    drops = ((r"(module\.)?(dino_|ibot_)?head\.", "projection head"), (mask, "mask token"))
    is_v2 = words == "DINOv2"
    return _Layout(
        f"{words}, {which}", words.lower(), (which,), (mask if is_v2 else prefix,),
        "$." if is_v2 else mask, prefix, drops, which, convert=_dinov2 if is_v2 else None,
    )  # fmt: skip


# The first that matches is taken; of a file with several encoders, the first is the default.
# fmt: off
LAYOUTS = (
    _moco("base", "momentum"),
    _moco("momentum", "base"),
    _Layout(
        "MoCo v3, linear-probed", "mocov3", ("state_dict",),
        (r"module\.head\.weight$", r"module\.blocks\."), r"module\.\w+_encoder\.", r"module\.",
        ((r"module\.head\.", "classifier"),),
        warning="this is MoCo v3's linear-probed file (linear-vit-*.pth.tar), the one that VPT's "
        "README links (KMnP/vpt#53); the self-supervised file is vit-*-300ep.pth.tar",
    ),
    _dino("DINOv2", "teacher"), _dino("DINOv2", "student"),
    _dino("DINO", "teacher"), _dino("DINO", "student"),
    _Layout(
        "MAE, encoder and decoder", "mae", ("model", ""), (r"decoder_embed\.", r"blocks\."),
        drops=((r"decoder_", "decoder"), (r"mask_token$", "mask token")),
    ),
    _Layout(
        "MAE, fine-tuned", "mae-finetuned", ("model",), (r"fc_norm\.", r"head\."), r"norm\.",
        drops=(_CLASSIFIER,),
        warning="this MAE file was fine-tuned with labels; the self-supervised file is "
        "mae_pretrain_vit_*.pth",
    ),
    _Layout(
        "MAE, encoder", "mae", ("model",),
        (r"blocks\.0\.attn\.qkv\.bias$", r"norm\.", r"cls_token$"),
        r"head\.|fc_norm\.|reg|mask_token|storage_tokens|lm_head|blocks\.\d+\.(ls1|gamma_1)",
    ),
    _Layout(
        "DINOv2", "dinov2", ("", "model"), (r"mask_token$", r"blocks\..*\.ls1\.gamma$"),
        r"storage_tokens", drops=((r"mask_token$", "mask token"),), convert=_dinov2,
    ),
    _Layout(
        "CLIP, vision tower", "clip", ("", "state_dict", "model"),
        (_TOWER + r"(patch_embed|conv1)\.",),
        drops=(
            (r"(?!(module\.)?visual\.)", "text tower"),
            (r"(module\.)?visual\.(proj$|(trunk\.)?head\.)", "projection"), _MASK, _ROTARY,
        ),
        convert=_by_timm,
    ),
    _Layout(
        "DINOv3", "dinov3", ("", "model"), (r"storage_tokens$",), drops=(_MASK, _ROTARY),
        convert=_by_timm,
    ),
    _Layout(
        "timm's names", "timm", ("", "model", "state_dict", "model_ema", "module"),
        (r"patch_embed\.proj\.weight$", r"blocks\.0\."), drops=(_CLASSIFIER, _MASK, _ROTARY),
        convert=_by_timm,
    ),
)
# fmt: on


_ENCODERS = (
    "MoCo v3 has module.base_encoder.* or module.momentum_encoder.* in its state_dict, DINO "
    "backbone.* in its teacher or student"
)


def _recognise(file: Mapping, which: str | None) -> tuple[_Layout, Mapping]:
    entries = {"": file} | {name: v for name, v in file.items() if isinstance(v, Mapping)}
    found = [
        (layout, entries[entry])
        for layout in LAYOUTS
        for entry in layout.entries
        if entry in entries and layout.matches(entries[entry])
    ]
    if not found:
        names = max(entries.values(), key=lambda c: sum(isinstance(v, Tensor) for v in c.values()))
        asks = "teacher" in file or "student" in file or "state_dict" in file
        raise CheckpointError(
            f"load_backbone: no known layout has the file's {len(names)} keys, {first_names(names)}"
            + (f"; which encoder? with which={which!r}, {_ENCODERS}" if asks else "")
        )
    first = found[0][0]
    if first.which is None:
        if which is not None:
            raise ValueError(
                f"load_backbone: which must be None for a file of one encoder ({first.words}), "
                f"got {which!r}"
            )
        return found[0]
    family = [layout for layout in LAYOUTS if layout.source == first.source and layout.which]
    choices = {layout.which: (layout, tensors) for layout, tensors in found if layout in family}
    wanted = which or family[0].which
    if wanted not in choices:
        raise ValueError(
            f"load_backbone: which must be one of {tuple(choices)} for this file ({first.words}), "
            f"got {which!r}" + ("" if which else f", which means {wanted!r}")
        )
    return choices[wanted]


# ---- loading ----


@dataclass(frozen=True)
class LoadReport:
    """What a loader did; `str()` says it in words.

    Attributes:
        layout: The layout of the file, in words.
        loaded, total: Tensors that were copied, of those that the model has; equal.
        dropped: Names in the file that were left out.
        notes: What was left out, resampled or renamed, in words.
        missing: Names of the model that the file does not set: its classifier.
        what: What `loaded` counts.
    """

    layout: str
    loaded: int
    total: int
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    what: str = "backbone tensors"

    def __str__(self) -> str:
        counts = f"{self.layout}: {self.loaded} of {self.total} {self.what}, 0 unexpected"
        return "; ".join((counts, *self.notes))


def load_backbone(
    vit: nn.Module,
    source: str | os.PathLike | Mapping,
    *,
    which: str | None = None,
    allow_nonfinite: bool = False,
    expect_sha256: str | None = None,
) -> LoadReport:
    """Loads a checkpoint's backbone into a timm model, all of it or none.

    Reads MAE (encoder, with decoder, fine-tuned), MoCo v3 (both encoders, linear-probed), DINO and
    DINOv2 (flat, full, training teacher; registers), and what timm's converters read: timm's own
    names, CLIP and SigLIP vision towers, EVA, DINOv3. A classifier is never loaded. Position
    embeddings are resampled to the model's image size (bicubic, antialiased).

    Args:
        vit: A timm `VisionTransformer` or `Eva`, not wrapped.
        source: A path for `read_checkpoint`, or what it returned.
        which: "base" (default) or "momentum" for MoCo v3; "teacher" (default) or "student" for
            DINO.
        allow_nonfinite: Accept NaN and infinite weights.
        expect_sha256: See `read_checkpoint`.

    Returns:
        A `LoadReport`, also logged. `vit._gated_prompt_source` is set to "mae", "mae-finetuned",
        "mocov3", "dino", "dinov2", "clip", "dinov3" or "timm".

    Raises:
        CheckpointError: unknown layout; a tensor missing, unexpected, of another shape, not finite.
            The model is as it was.
        ValueError: which does not fit the file.
        TypeError: vit is neither.
        RuntimeError: vit is wrapped, or on the meta device.
    """
    who = "load_backbone"
    if isinstance(vit, GatedPromptViT) or getattr(vit, "_is_wrapped_by_gated_prompt", False):
        raise RuntimeError(f"{who}: vit is wrapped; load its backbone before wrap")
    _check_family(who, vit)
    if any(tensor.is_meta for tensor in vit.state_dict().values()):
        raise RuntimeError(f"{who}: vit is on the meta device; use vit.to_empty(device=...) first")
    if not isinstance(source, Mapping):
        source = read_checkpoint(source, expect_sha256=expect_sha256)
    elif expect_sha256 is not None:
        raise ValueError(f"{who}: expect_sha256 needs a path, got a {type(source).__name__}")
    layout, entry = _recognise(source, which)
    notes, dropped, kept, strangers = [], collections.defaultdict(list), {}, []
    for name, value in entry.items():
        words = next((w for pattern, w in layout.drops if re.match(pattern, str(name))), None)
        prefix = re.match(layout.prefix, str(name))
        if words is not None:
            dropped[words].append(name)
        elif prefix is None:
            strangers.append(name)
        elif not isinstance(value, Tensor):
            raise CheckpointError(f"{who}: {name!r} must be a tensor, got {type(value).__name__}")
        elif name[prefix.end() :] in kept:
            raise CheckpointError(f"{who}: two tensors of the file are {name[prefix.end() :]!r}")
        else:
            kept[name[prefix.end() :]] = value.detach()
    notes += [f"dropped {len(names)} ({words})" for words, names in dropped.items()]
    state = layout.convert(kept, vit, notes) if layout.convert else kept
    is_masked_eva = isinstance(vit, eva.Eva) and _MASK[1] in dropped
    if (layout.source == "mae" or is_masked_eva) and isinstance(vit.norm, nn.Identity):
        moved = {f"norm.{n}" for n in ("weight", "bias")} & {*state}
        if moved and isinstance(vit.fc_norm, nn.LayerNorm):
            state = {f"fc_{n}" if n in moved else n: v for n, v in state.items()}
            notes.append("norm -> fc_norm, as the model norms after its average pool")
    targets = vit.state_dict()
    missing = tuple(name for name in targets if re.match(r"head(_dist)?\.", name))
    targets = {name: target for name, target in targets.items() if name not in missing}
    _check_names(f"{who}: {layout.words}", targets, state, strangers)
    if layout.source == "mocov3" and vit.embed_dim == 384 and vit.blocks[0].attn.num_heads != 12:
        raise CheckpointError(
            f"{who}: MoCo v3's ViT-S has 12 heads, which its tensors don't show, and vit has "
            f"{vit.blocks[0].attn.num_heads}: build it with num_heads=12"
        )
    if layout.convert is not _by_timm:
        _fit_positions(state, vit, notes)
    values = _checked_values(f"{who}: {layout.words}", targets, state, allow_nonfinite)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    vit._gated_prompt_source = layout.source
    if layout.warning is not None:
        warnings.warn(f"{who}: {layout.warning}", stacklevel=2)
    everything = tuple(name for names in dropped.values() for name in names)
    report = LoadReport(layout.words, len(values), len(targets), everything, tuple(notes), missing)
    _log.info("%s: %s", who, report)
    return report


def _check_family(who: str, vit: nn.Module) -> None:
    if not isinstance(vit, (vision_transformer.VisionTransformer, eva.Eva)):
        raise TypeError(
            f"{who}: vit must be a timm VisionTransformer or Eva, "
            f"got {type(vit).__module__}.{type(vit).__name__}"
        )


def _check_names(who: str, targets: Mapping, state: Mapping, strangers=()) -> None:
    missing = [name for name in targets if name not in state]
    unexpected = [*(name for name in state if name not in targets), *strangers]
    if not missing and not unexpected:
        return
    norms = {"norm.weight", "fc_norm.weight"}
    hint = ""
    if norms & {*missing} and norms & {*unexpected}:
        pool = "avg" if "fc_norm.weight" in unexpected else "token"
        hint = f"; the file's final norm needs a model built with global_pool={pool!r}"
    raise CheckpointError(
        f"{who}: {len(missing)} of {len(targets)} tensors missing ({first_names(missing)}), "
        f"{len(unexpected)} unexpected ({first_names(unexpected)}){hint}"
    )


def _checked_values(who: str, targets: Mapping, state: Mapping, allow_nonfinite: bool) -> dict:
    """The state in the dtypes of the targets, once every tensor has passed."""
    for name, target in targets.items():
        if state[name].shape != target.shape:
            raise CheckpointError(
                f"{who}: {name} must be {list(target.shape)}, got {list(state[name].shape)}"
            )
        if not state[name].is_floating_point():
            raise CheckpointError(f"{who}: {name} must be floating, got {state[name].dtype}")
    values = {name: state[name].to(target.dtype) for name, target in targets.items()}
    for name, value in values.items():
        if not allow_nonfinite and not value.isfinite().all():
            raise CheckpointError(
                f"{who}: {name} must be finite, got {(~value.isfinite()).sum()} NaN or infinite "
                f"elements in {value.dtype}"
            )
    return values


def _fit_positions(state: dict, vit: nn.Module, notes: list) -> None:
    """Position embeddings [1, 1 + patches, D] of a square image -> the model's own.

    Where the model has none for prefix tokens, the class token's is added to the token itself;
    where it has some for registers, theirs are zero. Both compute the same.
    """
    positions = state["pos_embed"]
    patches = positions.shape[1] - 1 if positions.ndim == 3 and len(positions) == 1 else 0
    side, grid = math.isqrt(max(patches, 0)), tuple(vit.patch_embed.grid_size)
    old = (side, side) if side * side == patches else grid
    if patches < 1 or old[0] * old[1] != patches:
        raise CheckpointError(
            f"load_backbone: pos_embed must be [1, 1 + patches, D] of a square or "
            f"{grid[0]}x{grid[1]} grid, got {list(positions.shape)}"
        )
    prefix, rest = positions[:, :1], positions[:, 1:]
    if old != grid:
        rest = resample_abs_pos_embed(rest, new_size=grid, old_size=old, num_prefix_tokens=0)
        words = " -> ".join(f"{height}x{width}" for height, width in (old, grid))
        notes.append(f"position embeddings resampled {words}")
    registers = 0 if vit.reg_token is None else vit.reg_token.shape[1]
    if vit.no_embed_class:
        state["cls_token"] = state["cls_token"] + prefix
        prefix = prefix[:, :0]
        notes.append("the class token's position embedding added to cls_token")
    elif registers:
        prefix = torch.cat([prefix, prefix.new_zeros(1, registers, prefix.shape[2])], dim=1)
        notes.append("zero position embeddings for the registers")
    state["pos_embed"] = torch.cat([prefix, rest], dim=1)


def create_backbone(
    name: str,
    *,
    checkpoint: str | os.PathLike | Mapping | None = None,
    num_classes: int = 0,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    which: str | None = None,
    expect_sha256: str | None = None,
    **kwargs,
) -> nn.Module:
    """A timm ViT by name, with the weights of `checkpoint` where one is given.

    Args:
        name: As in `timm.list_models()`, with or without a tag.
        checkpoint, which, expect_sha256: See `load_backbone`.
        pretrained: timm downloads the weights of the tag.
        kwargs: For `timm.create_model`.

    Raises:
        ValueError: unknown name, with near ones; checkpoint together with pretrained.
        TypeError: the model is neither a `VisionTransformer` nor an `Eva`.
        CheckpointError: see `load_backbone`.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("create_backbone: give checkpoint or pretrained=True, got both")
    for option, value in (("which", which), ("expect_sha256", expect_sha256)):
        if checkpoint is None and value is not None:
            raise ValueError(f"create_backbone: {option}={value!r} needs a checkpoint, got None")
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    if name not in known:
        near = difflib.get_close_matches(str(name), sorted(known), n=5)
        raise ValueError(
            f"create_backbone: name must be one of timm's models, got {name!r}"
            + (f"; near: {', '.join(near)}" if near else "; timm.list_models('vit*') lists them")
        )
    vit = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, img_size=img_size, **kwargs
    )
    _check_family("create_backbone", vit)
    if checkpoint is not None:
        load_backbone(vit, checkpoint, which=which, expect_sha256=expect_sha256)
    return vit


def load_official(model: GatedPromptViT, source: str | os.PathLike | Mapping) -> LoadReport:
    """Loads a tuned checkpoint of the original project into a wrapped model, all of it or none.

    Its keys, each perhaps under `module.` or `enc.`: prompt_embeddings [1, P, D], gate_logit [G],
    temp [L], deep_prompt_embeddings [L-1, P, D], head.last_layer.{weight,bias}, and the backbone in
    timm's names, or none of it. gate_logit is the logit itself (only the original's config has its
    sign turned). The model must be wrapped alike: scalar gates of rule "mix", prompts at the start,
    gated_blocks=G.

    Returns:
        A `LoadReport`; it counts the tensors of the file.

    Raises:
        TypeError: model is not what `wrap` returned.
        RuntimeError: the model's gates or prompts are of another kind.
        CheckpointError: a tensor missing, unexpected, of another shape, not finite. The model is as
            it was.

    Source: Yoo et al., ICML 2023; key names of github ryongithub/GatedPromptTuning.
    """
    who = "load_official"
    if not isinstance(model, GatedPromptViT):
        raise TypeError(f"{who}: model must be what wrap returned, got {type(model).__name__}")
    for gate in model.gates:
        if (gate.gate, gate.rule) != ("scalar", "mix"):
            raise RuntimeError(
                f"{who}: the original's gates are 'scalar' with rule 'mix', the model's are "
                f"{gate.gate!r} with {gate.rule!r}"
            )
    if model.prompts is not None and model.prompts.position != "start":
        raise RuntimeError(
            f"{who}: the original's prompts are at the start, got {model.prompts.position!r}"
        )
    file = source if isinstance(source, Mapping) else read_checkpoint(source)
    file = next(
        (file[e] for e in ("model", "state_dict") if isinstance(file.get(e), Mapping)), file
    )
    state = {re.sub(r"^(module\.)?(enc\.)?", "", str(n)): v for n, v in file.items()}
    if len(state) < len(file) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{who}: not names and tensors of one model: {first_names(file)}")
    if "prompt_embeddings" not in state and "head.last_layer.weight" not in state:
        raise CheckpointError(
            f"{who}: neither prompt_embeddings nor head.last_layer.weight among {len(state)} keys, "
            f"{first_names(state)}"
        )
    notes = []
    targets, values, dropped = _tuned_parts(who, model, state, notes)
    used = len(file) - len(state) - len(dropped)
    heads = [name for name in state if name in ("head.weight", "head.bias")]
    dropped += heads
    backbone = {name: value for name, value in state.items() if name not in heads}
    if backbone:
        own = {
            re.sub(r"^(blocks\.\d+\.attn\.)attn\.", r"\1", name): tensor
            for name, tensor in model.backbone.state_dict().items()
            if not re.match(r"head\.|blocks\.\d+\.attn\.temperature$", name)
        }
        _check_names(f"{who}: backbone", own, backbone)
        changed = sum(
            not torch.equal(own[n], v.to(own[n]))
            for n, v in backbone.items()
            if v.shape == own[n].shape
        )
        notes.append(f"{len(backbone)} backbone tensors, {changed} of them new to the model")
        used, targets, values = used + len(backbone), targets | own, values | backbone
    else:
        notes.append("no backbone in the file; the model's is kept")
    values = _checked_values(who, targets, values, allow_nonfinite=False)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    words = "tuned checkpoint of the original project"
    return LoadReport(words, used, used, tuple(dropped), tuple(notes), (), "tensors")


def _tuned_parts(who: str, model: GatedPromptViT, state: dict, notes: list):
    """Takes what is tuned out of state: rows of the model's parameters, rows of the file, drops."""
    deep = getattr(model, "deep_prompts", None)
    parts = {  # key -> the model's tensors that its rows are copied to, and how to get them
        "prompt_embeddings": ([] if model.prompts is None else [model.prompts.tokens], "prompts"),
        "deep_prompt_embeddings": ([] if deep is None else deep.tokens, "method='vpt-deep'"),
        "gate_logit": ([gate.logit.view(()) for gate in model.gates], "gated_blocks"),
        "temp": ([t.view(()) for t in model.temperatures], "temperature=True"),
        "head.last_layer.weight": (getattr(model.head, "weight", []), "a head"),
        "head.last_layer.bias": (getattr(model.head, "bias", []), "a head"),
    }
    dropped, targets, values = [], {}, {}
    for key, (rows, option) in parts.items():
        rows = [row.detach() for row in rows]
        value = state.pop(key, None)
        if value is None and not rows:
            notes.append(f"no {key}, and the model has none")
        elif value is None:
            raise CheckpointError(
                f"{who}: {key} is missing and the model needs {[len(rows), *rows[0].shape]} (the "
                "original's save_prompt leaves gates and temperatures out; its full state_dict has "
                "them)"
            )
        elif not rows and deep is not None and key in ("gate_logit", "temp"):
            dropped.append(key)
            notes.append(f"dropped {key}, which the original ignores beside deep prompts")
        elif not rows or value.shape != (len(rows), *rows[0].shape):
            wanted = [len(rows), *rows[0].shape] if rows else f"absent (wrap without {option})"
            raise CheckpointError(f"{who}: {key} must be {wanted}, got {list(value.shape)}")
        else:
            targets |= {f"{key}[{i}]": row for i, row in enumerate(rows)}
            values |= {f"{key}[{i}]": row for i, row in enumerate(value.detach())}
    return targets, values, dropped
