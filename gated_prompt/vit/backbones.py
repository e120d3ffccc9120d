# SPDX-License-Identifier: Apache-2.0
"""Backbones from checkpoint files, by a table of key layouts.

Every layout that is read stands in `LAYOUTS`. A file is loaded completely or not at all: what is
left out of it is a known part (a decoder, a projector, a classifier) or stands outside the prefix
of the ViT's names, and is named in the report.
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
from timm.models import adapt_input_conv, eva, vision_transformer
from torch import Tensor, nn

from gated_prompt.vit.checkpoint_file import CheckpointError, first_names, read_checkpoint
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.wrapping import is_wrapped

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


def _has_positions(tensors: Mapping, slow_first: bool) -> bool:
    """Whether pos_embed is the fixed one of MoCo v3 (slow_first) or of MAE, but for rounding.

    A row is sin, cos of one coordinate, then of the other: MoCo v3 begins with that which varies
    slowest, MAE with the other. The class token's row is zero.
    """
    positions = tensors.get("pos_embed")
    if not isinstance(positions, Tensor) or not positions.is_floating_point():
        return False
    rows, width = positions.shape[-2:] if positions.ndim == 3 and len(positions) == 1 else (0, 0)
    side = math.isqrt(max(rows - 1, 0))
    if side < 2 or side * side != rows - 1 or width < 4 or width % 4:
        return False
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    slow, fast = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    wanted = torch.cat((slow, fast) if slow_first else (fast, slow), dim=1)
    errors = positions[0].cpu().double() - nn.functional.pad(wanted, (0, 0, 1, 0))
    return errors.abs().max().item() <= max(1e-4, torch.finfo(positions.dtype).eps / 2)


def _is_mocos(tensors: Mapping, file: Mapping) -> bool:
    return _has_positions(tensors, slow_first=True)


def _is_maes(tensors: Mapping, file: Mapping) -> bool:
    return _has_positions(tensors, slow_first=False)


def _is_of_maes_finetuning(tensors: Mapping, file: Mapping) -> bool:
    """By the arguments of MAE's main_finetune.py: it trains the position embeddings."""
    args = file.get("args")
    names = ("nb_classes", "drop_path", "global_pool", "blr", "finetune")
    return all(hasattr(args, name) for name in names) and bool(args.finetune)


@dataclass(frozen=True)
class _Layout:
    """A key layout. Patterns are matched at the start of a name after the encoder's prefix.

    Attributes:
        words, source: Its name for the reader, and for the attribute on the model.
        signs, absent: Some name matches each of `signs`; no name matches `absent`.
        proof: (tensors, file) -> whether the values, or the rest of the file, prove it.
        place: A pattern of "entry/prefix", where the encoder must be.
        drops: (pattern, words) of what is left out.
        outside: The same of names that don't have the prefix, where no others may be; None: any,
            and the report names them.
        warning: Said when it is loaded.
        convert: (tensors, vit, notes) -> tensors in timm's names; None: they have them.
    """

    words: str
    source: str
    signs: tuple[str, ...] = ()
    absent: str = "$."
    proof: Callable[[Mapping, Mapping], bool] | None = None
    place: str = ""
    drops: tuple[tuple[str, str], ...] = ()
    outside: tuple[tuple[str, str], ...] | None = None
    warning: str | None = None
    convert: Callable[[dict, nn.Module, list], dict] | None = None

    def fits(self, place: str, tensors: Mapping, file: Mapping) -> bool:
        return (
            re.match(self.place, place) is not None
            and all(any(re.match(sign, name) for name in tensors) for sign in self.signs)
            and not any(re.match(self.absent, name) for name in tensors)
            and (self.proof is None or self.proof(tensors, file))
        )


_CLASSIFIER = (r"(.*\.)?(head(_dist)?|pre_logits)\.", "classifier")
_MASK = (r"(.*\.)?(mask_token$|lm_head\.)", "masked-image parts")
_ROTARY = (r".*(rope.*\.(freqs_cos|freqs_sin|periods)|bias_mask)$|local_cls_norm\.", "constants")
_MOCO = r".*[/.](base|momentum)_encoder\.$"
_DINO = {
    "place": r"(teacher|student)/(.*\.)?backbone\.$",
    "outside": ((r"(.*\.)?(dino_|ibot_)?head\.", "projection head"),),
}

# The first that fits an encoder is its layout.
# fmt: off
LAYOUTS = (
    _Layout(
        "MoCo v3", "mocov3", place=_MOCO, drops=((r"head\.", "projector head"),), outside=(
            (r"(.*\.)?momentum_encoder\.", "momentum encoder"),
            (r"(.*\.)?base_encoder\.", "base encoder"), (r"(.*\.)?predictor\.", "predictor"),
        ),
    ),
    _Layout(
        "MoCo v3, linear-probed", "mocov3", (r"head\.weight$",), proof=_is_mocos,
        drops=(_CLASSIFIER,),
        warning="this is MoCo v3's linear-probed file (linear-vit-*.pth.tar). VPT's README links "
        "it and VPT's code loads it, so VPT's published numbers use it (KMnP/vpt#53). The gated "
        "prompt paper builds on VPT's setup; its code reads either file. The self-supervised file "
        "is vit-*-300ep.pth.tar",
    ),
    _Layout(
        "MoCo v3, encoder", "mocov3", proof=_is_mocos, drops=((r"head\.", "projector head"),),
    ),
    _Layout(
        "DINOv2", "dinov2", (r"mask_token$",), drops=((r"mask_token$", "mask token"),),
        convert=_dinov2, **_DINO,
    ),
    _Layout("DINO", "dino", **_DINO),
    _Layout(
        "MAE, encoder and decoder", "mae", (r"decoder_embed\.",),
        drops=((r"decoder_", "decoder"), (r"mask_token$", "mask token")),
    ),
    _Layout(
        "MAE, fine-tuned", "mae-finetuned", (r"head\.",), proof=_is_of_maes_finetuning,
        drops=(_CLASSIFIER,),
        warning="this MAE file was fine-tuned with labels; the self-supervised file is "
        "mae_pretrain_vit_*.pth",
    ),
    _Layout("MAE, encoder", "mae", absent=r"head\.|fc_norm\.", proof=_is_maes, drops=(_MASK,)),
    _Layout(
        "DINOv2", "dinov2", (r"mask_token$", r"blocks\..*\.ls1\.gamma$"), r"storage_tokens",
        drops=((r"mask_token$", "mask token"),), convert=_dinov2,
    ),
    _Layout(
        "CLIP, vision tower", "clip", (r"visual\.",),
        drops=(
            (r"(?!visual\.)", "text tower"),
            (r"visual\.(proj$|(trunk\.)?head\.)", "projection"), _MASK, _ROTARY,
        ),
        convert=_by_timm,
    ),
    _Layout(
        "DINOv3", "dinov3", (r"storage_tokens$",), drops=(_MASK, _ROTARY), convert=_by_timm,
    ),
    _Layout(
        "timm's names", "timm", (r"blocks\.0\.",), drops=(_CLASSIFIER, _MASK, _ROTARY),
        convert=_by_timm,
    ),
)
# fmt: on

# (a pattern of a place that shows the choice, {which: pattern of its place}); the first is taken
# without being asked for.
_CHOICES = (
    (_MOCO, {"base": r".*base_encoder\.$", "momentum": r".*momentum_encoder\.$"}),
    (r"(teacher|student)/", {"teacher": r"teacher/", "student": r"student/"}),
    (
        r"(state_dict|model)_ema/",
        {"ema": r"(state_dict|model)_ema/", "raw": r"(state_dict|model)/"},
    ),
    (r"target_encoder/", {"target": r"target_encoder/", "encoder": r"encoder/"}),
)
_EMA_NOTES = {
    "ema": "the EMA weights, as timm takes them; which='raw' loads the others",
    "raw": "the weights that are not the EMA; which='ema' loads the EMA",
}

# What stands before one of these is the prefix: module. of DDP, _orig_mod. of torch.compile, model.
# or another attribute of a Lightning module, all of them stacked.
_ENCODER = re.compile(r"(|.*?\.)((visual\.(trunk\.)?)?patch_embed\.proj|visual\.conv1)\.weight")


@dataclass(frozen=True)
class _Encoder:
    """A ViT of a file: what one of its entries ("": the file itself) has after one prefix."""

    entry: str
    prefix: str
    tensors: dict
    outside: tuple[str, ...]  # the names without the prefix
    layout: _Layout

    @property
    def place(self) -> str:
        return f"{self.entry}/{self.prefix}"


def _entries(file: Mapping) -> dict[str, dict]:
    """The file itself and the dicts in it."""
    entries = (("", file), *file.items())
    return {
        str(entry): {str(name): value for name, value in content.items()}
        for entry, content in entries
        if isinstance(content, Mapping)
    }


def _encoders(file: Mapping) -> list[_Encoder]:
    found = []
    for entry, content in _entries(file).items():
        anchors = (_ENCODER.fullmatch(n) for n, v in content.items() if isinstance(v, Tensor))
        prefixes = {anchor[1]: {} for anchor in anchors if anchor}
        of = sorted(prefixes, key=len, reverse=True)  # a name belongs to the longest
        for name, value in content.items():
            prefix = next((prefix for prefix in of if name.startswith(prefix)), None)
            if prefix is not None:
                prefixes[prefix][name.removeprefix(prefix)] = value
        for prefix, tensors in prefixes.items():
            place = f"{entry}/{prefix}"
            own = {prefix + name for name in tensors}
            outside = tuple(name for name in content if name not in own)
            for layout in LAYOUTS:
                if layout.fits(place, tensors, file):
                    found.append(_Encoder(entry, prefix, tensors, outside, layout))
                    break
    return found


def _recognise(file: Mapping, which: str | None) -> tuple[_Encoder, str | None, list[str]]:
    """The encoder to load, its choice where there is one, and notes."""
    encoders = _encoders(file)
    if not encoders:
        names = max(
            _entries(file).values(), key=lambda c: sum(isinstance(v, Tensor) for v in c.values())
        )
        raise CheckpointError(
            f"load_backbone: no known layout has the file's {len(names)} keys, "
            f"{first_names(names)}; a ViT has patch_embed.proj.weight and blocks.0.*, perhaps "
            "after a prefix"
        )
    words = encoders[0].layout.words
    default, choices = _choices(encoders)
    if len(encoders) == 1 and default is None:
        if which is not None:
            raise ValueError(
                f"load_backbone: which must be None for a file of one encoder ({words}), "
                f"got {which!r}"
            )
        return encoders[0], None, []
    wanted = default if which is None else which
    if wanted not in choices:
        raise ValueError(
            f"load_backbone: which must be one of {tuple(choices)} for this file ({words}), "
            f"got {which!r}" + (f", which means {default!r}" if which is None and default else "")
        )
    has_both = default == "ema" and len(choices) == 2
    return choices[wanted], wanted, [_EMA_NOTES[wanted]] if has_both else []


def _choices(encoders: list[_Encoder]) -> tuple[str | None, dict[str, _Encoder]]:
    """The default, if there is one, and the encoders by `which`."""
    for sign, places in _CHOICES:
        if any(re.match(sign, encoder.place) for encoder in encoders):
            named = [(w, e) for w, p in places.items() for e in encoders if re.match(p, e.place)]
            if len(dict(named)) == len(named) == len(encoders):
                return next(iter(places)), dict(named)
    is_one_entry = len({encoder.entry for encoder in encoders}) == 1
    return None, {(e.prefix if is_one_entry else e.place).rstrip("/."): e for e in encoders}


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
    names, CLIP and SigLIP vision towers, EVA, DINOv3. Any prefix may stand before the names, such
    as those of DDP, torch.compile, Lightning and I-JEPA. MAE's encoder and MoCo v3's linear-probed
    file are told from other files by their fixed position embeddings. A classifier is never loaded.
    Position embeddings are resampled to the model's image size (bicubic, antialiased), and an RGB
    patch embedding is adapted to its channels as timm does it.

    Args:
        vit: A timm `VisionTransformer` or `Eva`, not wrapped.
        source: A path for `read_checkpoint`, or what it returned.
        which: Of a file with several encoders, the one to load. "base" (default) or "momentum" for
            MoCo v3; "teacher" (default) or "student" for DINO; "ema" (default) or "raw" for
            training files of timm and DeiT with an EMA; "target" (default) or "encoder" for I-JEPA.
            For other files there is no default, and the error names the choices.
        allow_nonfinite: Accept NaN and infinite weights.
        expect_sha256: See `read_checkpoint`.

    Returns:
        A `LoadReport`, also logged. `vit._gated_prompt_source` is set to "mae", "mae-finetuned",
        "mocov3", "dino", "dinov2", "clip", "dinov3" or "timm".

    Raises:
        CheckpointError: unknown layout; a tensor missing, unexpected, of another shape, not finite.
            The model is as it was.
        ValueError: which does not fit the file, or is needed.
        TypeError: vit is neither.
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
    encoder, choice, notes = _recognise(source, which)
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
    for name in encoder.outside:
        part = "" if layout.outside is None else _part(name, layout.outside)
        (strangers if part is None else dropped[part]).append(name)
    left_out = dropped.pop("", [])
    notes += [f"dropped {len(names)} ({part})" for part, names in dropped.items()]
    if left_out:
        names = first_names(left_out)
        notes.append(f"left out {len(left_out)} outside {encoder.prefix!r} ({names})")
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
    check_names(f"{who}: {words}", targets, state, strangers)
    _fit_channels(state, vit, notes)
    if layout.source == "mocov3" and vit.embed_dim == 384 and vit.blocks[0].attn.num_heads != 12:
        raise CheckpointError(
            f"{who}: MoCo v3's ViT-S has 12 heads, which its tensors don't show, and vit has "
            f"{vit.blocks[0].attn.num_heads}: build it with num_heads=12"
        )
    if layout.convert is not _by_timm:
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


def check_names(who: str, targets: Mapping, state: Mapping, strangers=()) -> None:
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


def checked_values(who: str, targets: Mapping, state: Mapping, allow_nonfinite: bool) -> dict:
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


def _fit_channels(state: dict, vit: nn.Module, notes: list) -> None:
    """The patch embedding of an RGB file -> the channels of the model, as timm does it."""
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
