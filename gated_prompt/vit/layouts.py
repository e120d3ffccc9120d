# SPDX-License-Identifier: Apache-2.0
"""The layouts of checkpoint files: which keys each has, and how its layout is recognised.

`LAYOUTS` lists every supported layout, and `recognise` finds the encoder of a file and its layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from gated_prompt.vit.checkpoint_file import CheckpointError, first_names


def by_timm(tensors: dict, vit: nn.Module, notes: list) -> dict:
    """Runs timm's converter for the model's family and notes which tensors it resampled."""
    if isinstance(vit, eva.Eva):
        no_bias = not any(name.endswith("attn.q_bias") for name in vit.state_dict())
        for name in [n for n in tensors if "storage_tokens" in tensors and n.endswith("qkv.bias")]:
            if no_bias and tensors.pop(name).any():
                raise CheckpointError(
                    f"load_backbone: {name!r} is not zero, but the model has no such bias: build "
                    "timm's model of this size with '_qkvb' in its name"
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
    """Renames DINOv2's blocks in chunks (blocks.0.N.), packed SwiGLU and registers to timm's."""
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
        raise CheckpointError("load_backbone: two chunks of the file contain the same block")
    return state


def _has_positions(tensors: Mapping, slow_first: bool) -> bool:
    """True if pos_embed is the fixed one of MoCo v3 (slow_first) or of MAE, up to rounding.

    A row is the sines and cosines of one patch coordinate, then of the other coordinate. MoCo v3
    begins with the coordinate that varies slowest over the patches, MAE with the one that varies
    fastest. The class token's row is zero.
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
    """True if the file has the arguments of MAE's main_finetune.py. (Its position embeddings prove
    nothing, because it trains them.)"""
    args = file.get("args")
    names = ("nb_classes", "drop_path", "global_pool", "blr", "finetune")
    return all(hasattr(args, name) for name in names) and bool(args.finetune)


@dataclass(frozen=True)
class Layout:
    """A key layout. Patterns match the start of a name, without the encoder's prefix.

    Attributes:
        words, source: The layout's name for the reader, and for `vit._gated_prompt_source`.
        signs, absent: Each pattern in `signs` must match at least one name; `absent` must match no
            name.
        proof: (tensors, file) -> True if the values or the rest of the file prove the layout.
        place: A pattern for the place of the encoder in the file, "entry/prefix".
        drops: (pattern, words) of each part of the encoder that is not loaded.
        outside: (pattern, words) of names without the prefix; a name that matches none of them is
            an error. None: any names are allowed, and the report lists them.
        warning: The text of a warning when such a file is loaded.
        convert: (tensors, vit, notes) -> tensors under timm's names; None: the names are timm's.
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
MASKED_PARTS = (r"(.*\.)?(mask_token$|lm_head\.)", "masked-image parts")
_ROTARY = (r".*(rope.*\.(freqs_cos|freqs_sin|periods)|bias_mask)$|local_cls_norm\.", "constants")
_MOCO = r".*[/.](base|momentum)_encoder\.$"
_DINO = {
    "place": r"(teacher|student)/(.*\.)?backbone\.$",
    "outside": ((r"(.*\.)?(dino_|ibot_)?head\.", "projection head"),),
}

# The first layout that fits an encoder is taken.
# fmt: off
LAYOUTS = (
    Layout(
        "MoCo v3", "mocov3", place=_MOCO, drops=((r"head\.", "projector head"),), outside=(
            (r"(.*\.)?momentum_encoder\.", "momentum encoder"),
            (r"(.*\.)?base_encoder\.", "base encoder"), (r"(.*\.)?predictor\.", "predictor"),
        ),
    ),
    Layout(
        "MoCo v3, linear-probed", "mocov3", (r"head\.weight$",), proof=_is_mocos,
        drops=(_CLASSIFIER,),
        warning="this is MoCo v3's linear-probed file (linear-vit-*.pth.tar). VPT's README links "
        "it and VPT's code loads it, so VPT's published numbers use it (KMnP/vpt#53). The gated "
        "prompt paper builds on VPT's setup; its code reads either file. The self-supervised file "
        "is vit-*-300ep.pth.tar",
    ),
    Layout(
        "MoCo v3, encoder", "mocov3", proof=_is_mocos, drops=((r"head\.", "projector head"),),
    ),
    Layout(
        "DINOv2", "dinov2", (r"mask_token$",), drops=((r"mask_token$", "mask token"),),
        convert=_dinov2, **_DINO,
    ),
    Layout("DINO", "dino", **_DINO),
    Layout(
        "MAE, encoder and decoder", "mae", (r"decoder_embed\.",),
        drops=((r"decoder_", "decoder"), (r"mask_token$", "mask token")),
    ),
    Layout(
        "MAE, fine-tuned", "mae-finetuned", (r"head\.",), proof=_is_of_maes_finetuning,
        drops=(_CLASSIFIER,),
        warning="this MAE file was fine-tuned with labels; the self-supervised file is "
        "mae_pretrain_vit_*.pth",
    ),
    Layout(
        "MAE, encoder", "mae", absent=r"head\.|fc_norm\.", proof=_is_maes, drops=(MASKED_PARTS,),
    ),
    Layout(
        "DINOv2", "dinov2", (r"mask_token$", r"blocks\..*\.ls1\.gamma$"), r"storage_tokens",
        drops=((r"mask_token$", "mask token"),), convert=_dinov2,
    ),
    Layout(
        "CLIP, vision tower", "clip", (r"visual\.",),
        drops=(
            (r"(?!visual\.)", "text tower"),
            (r"visual\.(proj$|(trunk\.)?head\.)", "projection"), MASKED_PARTS, _ROTARY,
        ),
        convert=by_timm,
    ),
    Layout(
        "DINOv3", "dinov3", (r"storage_tokens$",), drops=(MASKED_PARTS, _ROTARY), convert=by_timm,
    ),
    Layout(
        "timm's names", "timm", (r"blocks\.0\.",), drops=(_CLASSIFIER, MASKED_PARTS, _ROTARY),
        convert=by_timm,
    ),
)
# fmt: on

# (pattern, {which: pattern for the place of that encoder}). If an encoder's place matches the first
# pattern, the user may choose with `which`. The first `which` is the default.
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

# An encoder's prefix is everything before one of these names: module. from DDP, _orig_mod. from
# torch.compile, model. or another attribute of a Lightning module, or several of these stacked.
_ENCODER = re.compile(r"(|.*?\.)((visual\.(trunk\.)?)?patch_embed\.proj|visual\.conv1)\.weight")


@dataclass(frozen=True)
class Encoder:
    """A ViT in a file: the names of one entry ("": the file itself) that have one prefix."""

    entry: str
    prefix: str
    tensors: dict
    outside: dict  # the values whose names don't have the prefix
    layout: Layout

    @property
    def place(self) -> str:
        return f"{self.entry}/{self.prefix}"


def _entries(file: Mapping) -> dict[str, dict]:
    """The file itself under "", and each dict in it under its key."""
    entries = (("", file), *file.items())
    return {
        str(entry): {str(name): value for name, value in content.items()}
        for entry, content in entries
        if isinstance(content, Mapping)
    }


def _encoders(file: Mapping) -> list[Encoder]:
    found = []
    for entry, content in _entries(file).items():
        anchors = (_ENCODER.fullmatch(n) for n, v in content.items() if isinstance(v, Tensor))
        prefixes = {anchor[1]: {} for anchor in anchors if anchor}
        of = sorted(prefixes, key=len, reverse=True)  # the longest prefix wins
        for name, value in content.items():
            prefix = next((prefix for prefix in of if name.startswith(prefix)), None)
            if prefix is not None:
                prefixes[prefix][name.removeprefix(prefix)] = value
        for prefix, tensors in prefixes.items():
            place = f"{entry}/{prefix}"
            own = {prefix + name for name in tensors}
            outside = {name: value for name, value in content.items() if name not in own}
            for layout in LAYOUTS:
                if layout.fits(place, tensors, file):
                    found.append(Encoder(entry, prefix, tensors, outside, layout))
                    break
    return found


def recognise(
    file: Mapping, which: str | None, who: str = "load_backbone"
) -> tuple[Encoder, str | None, list[str]]:
    """Returns the encoder to load, its `which` (None if the file has no choice), and notes. `who`
    is the function that errors name."""
    encoders = _encoders(file)
    if not encoders:
        names = max(
            _entries(file).values(), key=lambda c: sum(isinstance(v, Tensor) for v in c.values())
        )
        raise CheckpointError(
            f"{who}: the file's {len(names)} keys fit no known layout: "
            f"{first_names(names)}; a ViT has patch_embed.proj.weight and blocks.0.*, perhaps "
            "after a prefix"
        )
    words = encoders[0].layout.words
    default, choices = _choices(encoders)
    if len(encoders) == 1 and default is None:
        if which is not None:
            raise ValueError(
                f"{who}: which must be None for a file of one encoder ({words}), got {which!r}"
            )
        return encoders[0], None, []
    wanted = default if which is None else which
    if wanted not in choices:
        raise ValueError(
            f"{who}: which must be one of {tuple(choices)} for this file ({words}), "
            f"got {which!r}" + (f", which means {default!r}" if which is None and default else "")
        )
    has_both = default == "ema" and len(choices) == 2
    return choices[wanted], wanted, [_EMA_NOTES[wanted]] if has_both else []


def _choices(encoders: list[Encoder]) -> tuple[str | None, dict[str, Encoder]]:
    """Returns the default `which`, or None if there is none, and {which: encoder}."""
    for sign, places in _CHOICES:
        if any(re.match(sign, encoder.place) for encoder in encoders):
            named = [(w, e) for w, p in places.items() for e in encoders if re.match(p, e.place)]
            if len(dict(named)) == len(named) == len(encoders):
                return next(iter(places)), dict(named)
    is_one_entry = len({encoder.entry for encoder in encoders}) == 1
    return None, {(e.prefix if is_one_entry else e.place).rstrip("/."): e for e in encoders}
