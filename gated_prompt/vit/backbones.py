# SPDX-License-Identifier: Apache-2.0
"""Loads backbones from checkpoint files.

A backbone is loaded completely or not at all. The loader leaves out only known other parts (a
decoder, a projector, a classifier) and names without the prefix of the ViT's names; the report
lists them. The layouts of files are in layouts.py.
"""

from __future__ import annotations

import collections
import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, eva, vision_transformer
from torch import Tensor, nn

from gated_prompt.vit.checkpoint_file import CheckpointError, first_names, read_checkpoint
from gated_prompt.vit.layouts import MASKED_PARTS, by_timm, recognise
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.wrapping import is_wrapped

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What a loader did; `str()` puts it into words.

    Attributes:
        layout: The layout of the file, in words.
        loaded, total: The tensors that were copied and the tensors to fill; always equal.
        dropped: Names in the file that were not loaded.
        notes: What was dropped, resampled or renamed, in words.
        missing: Names of the model that the file does not set: its classifier.
        what: The things that `loaded` counts, in words.
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
    """Loads a checkpoint's backbone into a timm model, completely or not at all.

    Reads files of MAE (only the encoder, encoder and decoder, fine-tuned), MoCo v3 (both encoders,
    linear-probed), DINO and DINOv2 (only the backbone, or a training checkpoint; with or without
    registers), and everything that timm's converters read: timm's own names, CLIP and SigLIP vision
    towers, EVA, DINOv3. The names may have any prefix, such as the prefixes of DDP, torch.compile,
    Lightning and I-JEPA. MAE's encoder and MoCo v3's linear-probed file are recognised by their
    fixed position embeddings. A classifier is never loaded. Position embeddings are resampled to
    the model's image size (bicubic, antialiased). An RGB patch embedding is adapted to the model's
    channels as timm does it.

    Args:
        vit: A timm `VisionTransformer` or `Eva`, not wrapped.
        source: A path for `read_checkpoint`, or the dict that `read_checkpoint` returned.
        which: The encoder to load from a file with several. "base" (default) or "momentum" for MoCo
            v3; "teacher" (default) or "student" for DINO; "ema" (default) or "raw" for training
            files of timm and DeiT with an EMA; "target" (default) or "encoder" for I-JEPA. Other
            files have no default, and the error lists the choices.
        allow_nonfinite: Accept NaN and infinite weights.
        expect_sha256: See `read_checkpoint`.

    Returns:
        A `LoadReport`, also logged. `vit._gated_prompt_source` is set to "mae", "mae-finetuned",
        "mocov3", "dino", "dinov2", "clip", "dinov3" or "timm".

    Raises:
        CheckpointError: the layout is unknown; or a tensor is missing, unexpected, of another shape
            or not finite. The model is unchanged.
        ValueError: the file has no such `which`, or has no default and `which` is None.
        TypeError: vit is neither a `VisionTransformer` nor an `Eva`.
        RuntimeError: vit is wrapped, or on the meta device.
    """
    who = "load_backbone"
    if isinstance(vit, GatedPromptViT) or is_wrapped(vit):
        raise RuntimeError(f"{who}: vit is wrapped; load its backbone before wrap")
    _check_family(who, vit)
    if any(tensor.is_meta for tensor in vit.state_dict().values()):
        raise RuntimeError(f"{who}: vit is on the meta device; use vit.to_empty(device=...) first")
    if not isinstance(source, Mapping):
        source = read_checkpoint(source, expect_sha256=expect_sha256)
    elif expect_sha256 is not None:
        raise ValueError(f"{who}: expect_sha256 needs a path, got a {type(source).__name__}")
    encoder, choice, notes = recognise(source, which)
    layout = encoder.layout
    words = layout.words if choice is None else f"{layout.words}, {choice}"
    dropped, kept, strangers = collections.defaultdict(list), {}, []
    for name, value in encoder.tensors.items():
        part = _part(name, layout.drops)
        if part is not None:
            dropped[part].append(encoder.prefix + name)
        elif not isinstance(value, Tensor):
            raise CheckpointError(f"{who}: {name!r} must be a tensor, got {type(value).__name__}")
        else:
            kept[name] = value.detach()
    is_wrapped_model = any(re.search(r"(^|\.)prompts\.tokens$", name) for name in encoder.outside)
    hint = "; gp.load_wrapped loads the whole wrapped model" if is_wrapped_model else ""
    for name in encoder.outside:
        part = "" if layout.outside is None else _part(name, layout.outside)
        (strangers if part is None else dropped[part]).append(name)
    left_out = dropped.pop("", [])
    notes += [f"dropped {len(names)} ({part})" for part, names in dropped.items()]
    if left_out:
        names = first_names(left_out)
        notes.append(f"left out {len(left_out)} outside {encoder.prefix!r} ({names}){hint}")
    state = layout.convert(kept, vit, notes) if layout.convert else kept
    is_masked_eva = isinstance(vit, eva.Eva) and MASKED_PARTS[1] in dropped
    if (layout.source == "mae" or is_masked_eva) and isinstance(vit.norm, nn.Identity):
        moved = {f"norm.{n}" for n in ("weight", "bias")} & {*state}
        if moved and isinstance(vit.fc_norm, nn.LayerNorm):
            state = {f"fc_{n}" if n in moved else n: v for n, v in state.items()}
            notes.append("norm -> fc_norm, as the model norms after its average pool")
    targets = vit.state_dict()
    missing = tuple(name for name in targets if re.match(r"head(_dist)?\.", name))
    targets = {name: target for name, target in targets.items() if name not in missing}
    check_names(f"{who}: {words}", targets, state, strangers, hint)
    _fit_channels(state, vit, notes)
    if layout.source == "mocov3" and vit.embed_dim == 384 and vit.blocks[0].attn.num_heads != 12:
        raise CheckpointError(
            f"{who}: MoCo v3's ViT-S has 12 heads, but vit has {vit.blocks[0].attn.num_heads} (the "
            "shapes of the tensors are the same for both): build vit with num_heads=12"
        )
    if layout.convert is not by_timm:
        _fit_positions(state, vit, notes)
    values = checked_values(f"{who}: {words}", targets, state, allow_nonfinite)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    vit._gated_prompt_source = layout.source
    if layout.warning is not None:
        warnings.warn(f"{who}: {layout.warning}", stacklevel=2)
    everything = tuple(name for names in (*dropped.values(), left_out) for name in names)
    report = LoadReport(words, len(values), len(targets), everything, tuple(notes), missing)
    _log.info("%s: %s", who, report)
    return report


def _part(name: str, parts: tuple[tuple[str, str], ...]) -> str | None:
    return next((words for pattern, words in parts if re.match(pattern, name)), None)


def _check_family(who: str, vit: nn.Module) -> None:
    if not isinstance(vit, (vision_transformer.VisionTransformer, eva.Eva)):
        raise TypeError(
            f"{who}: vit must be a timm VisionTransformer or Eva, "
            f"got {type(vit).__module__}.{type(vit).__name__}"
        )


def check_names(who: str, targets: Mapping, state: Mapping, strangers=(), hint: str = "") -> None:
    missing = [name for name in targets if name not in state]
    unexpected = [*(name for name in state if name not in targets), *strangers]
    if not missing and not unexpected:
        return
    norms = {"norm.weight", "fc_norm.weight"}
    if norms & {*missing} and norms & {*unexpected}:
        pool = "avg" if "fc_norm.weight" in unexpected else "token"
        hint += f"; the file's final norm needs a model built with global_pool={pool!r}"
    raise CheckpointError(
        f"{who}: {len(missing)} of {len(targets)} tensors missing ({first_names(missing)}), "
        f"{len(unexpected)} unexpected ({first_names(unexpected)}){hint}"
    )


def checked_values(who: str, targets: Mapping, state: Mapping, allow_nonfinite: bool) -> dict:
    """Casts the state to the dtypes of the targets. Raises CheckpointError if a tensor has another
    shape, is not floating, or is not finite."""
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


def _fit_channels(state: dict, vit: nn.Module, notes: list) -> None:
    """Adapts the patch embedding of an RGB file to the model's channels, as timm does it."""
    name, wanted = "patch_embed.proj.weight", vit.patch_embed.proj.in_channels
    got = state[name].shape[1] if state[name].ndim == 4 else wanted
    if got == wanted:
        return
    if got != 3:
        raise CheckpointError(
            f"load_backbone: {name} must have {wanted} input channels, or 3 to be adapted, got "
            f"{got}: build vit with in_chans={got}"
        )
    state[name] = adapt_input_conv(wanted, state[name])
    notes.append(f"patch embedding adapted from 3 input channels to {wanted}")


def _fit_positions(state: dict, vit: nn.Module, notes: list) -> None:
    """Fits position embeddings [1, 1 + patches, D] to the model: its grid and its prefix tokens.

    The file's grid is square or the model's. If the model has no position embeddings for prefix
    tokens, the one of the class token is added to the class token itself. If the model has some for
    registers, they become zero. In both cases the prefix tokens get the values that they have in
    the file's own model.
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
    """Creates a timm ViT by name and loads `checkpoint` into it, if there is one.

    Args:
        name: A name from `timm.list_models()`, with or without a tag.
        checkpoint, which, expect_sha256: See `load_backbone`.
        num_classes: Number of outputs of the head that `wrap` makes. 0, the default: no head.
        img_size: Passed to `timm.create_model`. None: the architecture's size.
        pretrained: Lets timm download the weights of the tag.
        kwargs: Passed to `timm.create_model`.

    Raises:
        ValueError: the name is unknown (the message suggests similar names); or both checkpoint and
            pretrained are given.
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
