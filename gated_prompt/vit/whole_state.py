# SPDX-License-Identifier: Apache-2.0
"""Loads the whole state of a wrapped or attached model, backbone included, as training scripts save
it."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gated_prompt.attaching import NAME, attach, detach
from gated_prompt.modules import GATES
from gated_prompt.vit.backbones import check_names, checked_values
from gated_prompt.vit.checkpoint_file import CheckpointError, first_names, read_checkpoint
from gated_prompt.vit.layouts import recognise
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.prompt_init import DATA_INITS
from gated_prompt.vit.wrap import check_backbone, unwrap, wrap
from gated_prompt.vit.wrapping import unpatched_name

_log = logging.getLogger(__name__)
_WHO = "load_wrapped"
_ASSUMED = "which the tensors don't show; if the model was made with other options, give them to"
_OURS = ("prompts.", "deep_prompts.", "gates.", "temperatures.", "head.")


def load_wrapped(
    source: str | os.PathLike | Mapping,
    backbone: nn.Module,
    *,
    which: str | None = None,
    allow_nonfinite: bool = False,
    expect_sha256: str | None = None,
    **options,
) -> GatedPromptViT:
    """Wraps a backbone and loads a wrapped model's whole state dict, with the weights of the
    backbone, into the model.

    Reads what `torch.save(model.state_dict(), path)` wrote, checkpoints of timm's train.py, of
    MAE's scripts and of Lightning, and safetensors files. The names may have any prefix, such as
    the prefixes of DDP, torch.compile and transformers' TimmWrapper. The file must contain every
    tensor of the model, and no other below its prefix, except the backbone's own classifier, which
    is not used and not loaded.

    The tensors show num_prompts, gate, gated_blocks, the number of classes, whether the
    temperatures are learned, and most of method. A warning lists what was assumed for the others.

    Args:
        source: A path for `read_checkpoint`, or the dict that `read_checkpoint` returned, or a
            folder that `save_pretrained` wrote, with model.safetensors.
        backbone: A timm model of the same architecture, not wrapped. Its weights are overwritten.
            It is changed until `unwrap`, as by `wrap`.
        which: The model to load from a file with several, see `load_backbone`. "ema" (default) or
            "raw" for files of timm with an EMA.
        allow_nonfinite: Accept NaN and infinite values.
        expect_sha256: See `read_checkpoint`.
        options: Options of `wrap`. They win over what the tensors show. With frozen_dtype, `unwrap`
            restores the loaded weights as they were rounded.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the file does not contain a wrapped model; or a tensor is missing,
            unexpected, of another shape or not finite, because the backbone or the options do not
            fit. The backbone is not changed.
        TypeError, ValueError, RuntimeError: see `wrap`, and `load_backbone` for which.
    """
    check_backbone(backbone)
    state = _state_of(_read(_WHO, source, expect_sha256), which)
    # before wrap, because options from the file of another backbone need not fit this one
    own = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    theirs = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    check_names(f"{_WHO}: the file does not fit the backbone", _used(own), theirs)
    shown = _shown(state, options, _WHO)
    if options.get("prompt_init") in DATA_INITS:
        options["prompt_init"] = "uniform"  # needs no images; the prompts are loaded below
    model = wrap(backbone, **{**shown, **options})
    try:
        if "head" not in options:
            model.reset_classifier(len(state["head.weight"]) if "head.weight" in state else 0)
        targets = _used({unpatched_name(name): t for name, t in model.state_dict().items()})
        made = ", ".join(f"{name}={getattr(model.options, name)!r}" for name in shown)
        who = f"{_WHO}: the file does not fit a model with {made}"
        check_names(who, targets, state)
        values = checked_values(who, targets, state, allow_nonfinite)
    except BaseException:
        unwrap(model)
        raise
    for name, value in values.items():
        targets[name].copy_(value)
    assumed = [f"{n}={getattr(model.options, n)!r}" for n in _hidden(shown) if n not in options]
    if assumed:
        warnings.warn(f"{_WHO}: assumed {', '.join(assumed)}, {_ASSUMED} {_WHO}", stacklevel=2)
    return model.eval()


def load_attached(
    source: str | os.PathLike | Mapping,
    model: nn.Module,
    *,
    allow_nonfinite: bool = False,
    expect_sha256: str | None = None,
    **options,
) -> nn.Module:
    """Attaches gated prompts to a model and loads what an attached model has saved.

    Reads what `torch.save(model.state_dict(), path)` and transformers' `save_pretrained` wrote. The
    names may have a prefix, such as those of DDP, torch.compile and Lightning. The file must
    contain every tensor of the attached model, and no other below its prefix. Of a transformers
    model only the prompts, gates and temperatures are loaded: its `from_pretrained` loads the rest,
    and renames tensors on the way.

    The options of `attach` are `model.config.gated_prompts`, if `from_pretrained` has read the
    model from the saved folder. Otherwise the tensors show num_prompts, gate, gated_blocks and
    method, and a warning lists what was assumed for the others.

    Args:
        source: A path for `read_checkpoint`, or the dict that it returned, or a folder with
            model.safetensors.
        model: A model like the one that was saved, not attached.
        allow_nonfinite: Accept NaN and infinite values.
        expect_sha256: See `read_checkpoint`.
        options: Options of `attach`. They win over the others.

    Returns:
        The same model, attached, in eval mode.

    Raises:
        CheckpointError: the file does not contain an attached model; or a tensor is missing,
            unexpected, of another shape or not finite. The model is not attached then.
        TypeError, ValueError, RuntimeError: see `attach`.
    """
    who = "load_attached"
    state = _attached_state(who, _read(who, source, expect_sha256))
    own = {n.removeprefix(f"{NAME}."): t for n, t in state.items() if n.startswith(f"{NAME}.")}
    config = getattr(model, "config", None)
    saved = getattr(config, NAME, None)
    used = {**(_shown(own, options, who) if saved is None else saved), **options}
    attach(model, **used)
    for name, parameter in model.gated_prompts.named_parameters():
        if name in own:
            parameter.data = parameter.data.to(own[name].dtype)
    try:
        targets = {unpatched_name(name): tensor for name, tensor in model.state_dict().items()}
        if hasattr(config, "to_dict"):  # of transformers
            targets = {name: t for name, t in targets.items() if name.startswith(f"{NAME}.")}
            state = {name: t for name, t in state.items() if name.startswith(f"{NAME}.")}
        words = ", ".join(f"{name}={value!r}" for name, value in used.items())
        check_names(f"{who}: the file does not fit the model with {words}", targets, state)
        floats = {name: t for name, t in targets.items() if t.is_floating_point()}
        values = checked_values(f"{who}: the file does not fit", floats, state, allow_nonfinite)
    except BaseException:
        detach(model)
        raise
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values.get(name, state[name]))
    hidden = [name for name in _hidden(used) if name not in ("pool", "prompt_position")]
    hidden += ["keep_prompts", "start"]
    now = model.gated_prompts.options
    assumed = [f"{name}={now[name]!r}" for name in hidden if name not in options]
    if saved is None and assumed:
        warnings.warn(f"{who}: assumed {', '.join(assumed)}, {_ASSUMED} {who}", stacklevel=2)
    return model.eval()


def _attached_state(who: str, file: Mapping) -> dict[str, Tensor]:
    """Returns the state dict of the attached model in a file, without prefixes."""
    mark = f"{NAME}.prompts.tokens"
    for content in (file, *(value for value in file.values() if isinstance(value, Mapping))):
        found = [name for name in content if str(name).endswith(mark)]
        if len(found) == 1:
            root = found[0].removesuffix(mark)
            state = {n.removeprefix(root): t for n, t in content.items() if n.startswith(root)}
            return {unpatched_name(n): t for n, t in state.items() if isinstance(t, Tensor)}
    raise CheckpointError(
        f"{who}: the file must contain one attached model ({mark}), got {first_names(file)}"
    )


def _read(who: str, source, expect_sha256: str | None) -> Mapping:
    if isinstance(source, Mapping):
        if expect_sha256 is not None:
            raise ValueError(f"{who}: expect_sha256 needs a path, got a {type(source).__name__}")
        return source
    if os.path.isdir(source):
        return _of_folder(who, os.fspath(source), expect_sha256)
    return read_checkpoint(source, expect_sha256=expect_sha256)


def _of_folder(who: str, folder: str, expect_sha256: str | None) -> Mapping:
    """Reads a folder of `save_pretrained`: model.safetensors, or its parts by their index."""
    whole, index = (os.path.join(folder, f"model.safetensors{end}") for end in ("", ".index.json"))
    if os.path.exists(whole) or not os.path.exists(index):
        return read_checkpoint(whole, expect_sha256=expect_sha256)
    if expect_sha256 is not None:
        raise ValueError(f"{who}: expect_sha256 needs one file, got the parts of {index!r}")
    with open(index) as file:
        parts = sorted(set(json.load(file)["weight_map"].values()))
    if any(os.path.basename(part) != part for part in parts):
        raise CheckpointError(f"{who}: {index!r} must name files in its folder, got {parts[:5]}")
    state = {}
    for part in parts:
        state |= read_checkpoint(os.path.join(folder, part))
    return state


def _state_of(file: Mapping, which: str | None) -> dict[str, Tensor]:
    """Returns the state dict of the wrapped model in a file, without prefixes and timm's head."""
    encoder, _, notes = recognise(file, which, _WHO)
    place = re.fullmatch(r"(.*\.|)backbone\.(.*)", encoder.prefix)
    root, rest = place.groups() if place else (encoder.prefix, "")
    state = {f"backbone.{rest}{name}": value for name, value in encoder.tensors.items()}
    others = {name: value for name, value in encoder.outside.items() if name.startswith(root)}
    state |= {name.removeprefix(root): value for name, value in others.items()}
    state = {unpatched_name(name): value for name, value in state.items()}
    if not place or not any(name.startswith(_OURS) for name in state):
        raise CheckpointError(
            f"{_WHO}: the file must contain a wrapped model (backbone.*, with prompts.* or head.*),"
            f" got {first_names(encoder.prefix + name for name in encoder.tensors)}; "
            "gp.load_backbone reads a ViT that is not wrapped"
        )
    strangers = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{_WHO}: must be tensors: {first_names(strangers)}")
    if left_out := [name for name in encoder.outside if name not in others]:
        notes = [*notes, f"left out {len(left_out)} outside {root!r} ({first_names(left_out)})"]
    _log.info("%s: %s", _WHO, "; ".join([f"{len(state)} tensors of {encoder.place!r}", *notes]))
    return _used(state)


def _used(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without timm's head, which a wrapped model does not use."""
    return {name: t for name, t in state.items() if not re.match(r"backbone\.head(_dist)?\.", name)}


def _shown(state: Mapping[str, Tensor], options: Mapping, who: str) -> dict:
    """Returns the options of `wrap` that the tensors show. If _hidden contains "method", the method
    is the simplest one that fits."""
    tokens = state.get("prompts.tokens")
    if tokens is not None and tokens.ndim != 2:
        raise CheckpointError(f"{who}: prompts.tokens must be [P, D], got {list(tokens.shape)}")
    gates = {name.split(".")[1] for name in state if name.startswith("gates.")}
    is_tempered = any(name.startswith("temperatures.") for name in state)
    is_deep = "deep_prompts.tokens" in state
    if tokens is None:
        method, unused = "linear", ("num_prompts", "gate", "gated_blocks", "temperature")
    elif gates or is_tempered or options.get("temperature"):
        method, unused = "gpt-deep" if is_deep else "gpt", ()
    else:
        method, unused = "vpt-deep" if is_deep else "vpt-shallow", ("gate", "gated_blocks")
    contradicting = [f"{name}={options[name]!r}" for name in unused if options.get(name)]
    method = options.get("method", method)
    if contradicting and "method" not in options:
        raise CheckpointError(
            f"{who}: the file has no tensors for {', '.join(contradicting)}; they show method "
            f"{method!r}; if it is another one, give method="
        )
    shown = {"method": method}
    if tokens is not None:
        shown["num_prompts"] = len(tokens)
    if tokens is not None and str(method).startswith("gpt"):
        sizes = {"num_prompts": len(tokens), "dim": tokens.shape[1]}
        gate = _gate_of(state, sizes, who) if gates else None
        shown |= {"gate": gate, "gated_blocks": len(gates), "temperature": is_tempered}
    return shown


def _gate_of(state: Mapping[str, Tensor], sizes: Mapping[str, int], who: str) -> str:
    """Returns the kind of the gates, from the shape of the first gate's parameter."""
    name = next((n for n in ("gates.0.logit", "gates.0.weight") if n in state), None)
    if name is None:
        raise CheckpointError(f"{who}: gates.0.logit or gates.0.weight is missing")
    for gate, shape in GATES.items():
        is_same = [sizes.get(size, size) for size in shape] == list(state[name].shape)
        if is_same and gate.startswith("linear") == name.endswith("weight"):
            return gate
    raise CheckpointError(
        f"{who}: {name} must have the shape of one of {tuple(GATES)}, for {dict(sizes)}, got "
        f"{list(state[name].shape)}"
    )


def _hidden(shown: Mapping) -> list[str]:
    """The options that the tensors do not show and that change the logits, or what is tuned."""
    hidden = ["pool"]
    if not shown.get("gated_blocks") and not shown.get("temperature"):
        hidden.append("method")
    if shown.get("gated_blocks"):
        hidden.append("rule")
    if "temperature" in shown and not shown["temperature"]:
        hidden.append("temperature")
    return hidden if "num_prompts" not in shown else [*hidden, "prompt_position"]
