# SPDX-License-Identifier: Apache-2.0
"""Loads tuned checkpoints of the original project into a wrapped model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gated_prompt.vit.backbones import LoadReport, check_names, checked_values
from gated_prompt.vit.checkpoint_file import CheckpointError, first_names, read_checkpoint
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.wrapping import unpatched_name


def load_official(model: GatedPromptViT, source: str | os.PathLike | Mapping) -> LoadReport:
    """Loads a tuned checkpoint of the original project into a wrapped model, completely or not at
    all.

    The keys may have the prefixes `module.` and `enc.`. They are prompt_embeddings [1, P, D],
    gate_logit [G], temp [L], deep_prompt_embeddings [L-1, P, D], head.last_layer.{weight,bias}, and
    either the whole backbone under timm's names or nothing of it. gate_logit has the sign that this
    package uses (the value in the original's config has the opposite sign). The model must be
    wrapped as the original was: scalar gates with rule "mix", prompts at the start, gated_blocks=G.

    Returns:
        A `LoadReport`; its counts are tensors of the file.

    Raises:
        TypeError: model is not what `wrap` returned.
        RuntimeError: the model's gates are not scalar with rule "mix", or its prompts are not at
            the start.
        CheckpointError: a tensor is missing, unexpected, of another shape or not finite. The model
            is unchanged.

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
        raise CheckpointError(
            f"{who}: file must contain only the tensors of one model, got {first_names(file)}"
        )
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
            unpatched_name(name): tensor
            for name, tensor in model.backbone.state_dict().items()
            if not name.startswith("head.")
        }
        check_names(f"{who}: backbone", own, backbone)
        changed = sum(
            not torch.equal(own[n], v.to(own[n]))
            for n, v in backbone.items()
            if v.shape == own[n].shape
        )
        notes.append(
            f"{len(backbone)} backbone tensors, {changed} of them different from the model's"
        )
        used, targets, values = used + len(backbone), targets | own, values | backbone
    else:
        notes.append("no backbone in the file; the model's is kept")
    values = checked_values(who, targets, values, allow_nonfinite=False)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    words = "tuned checkpoint of the original project"
    return LoadReport(words, used, used, tuple(dropped), tuple(notes), (), "tensors")


def _tuned_parts(who: str, model: GatedPromptViT, state: dict, notes: list):
    """Removes the tuned parts from state, and splits them into rows.

    Returns:
        {"key[i]": row of the model's parameter}, {"key[i]": row of the file}, and the dropped keys.
    """
    deep = getattr(model, "deep_prompts", None)
    parts = {  # key -> (the model's tensors for its rows, the option of wrap that adds them)
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
            notes.append(f"dropped {key}, which the original ignores if there are deep prompts")
        elif not rows or value.shape != (len(rows), *rows[0].shape):
            wanted = (
                [len(rows), *rows[0].shape]
                if rows
                else f"absent, because the model was wrapped without {option}"
            )
            raise CheckpointError(f"{who}: {key} must be {wanted}, got {list(value.shape)}")
        else:
            targets |= {f"{key}[{i}]": row for i, row in enumerate(rows)}
            values |= {f"{key}[{i}]": row for i, row in enumerate(value.detach())}
    return targets, values, dropped
