# SPDX-License-Identifier: Apache-2.0
"""The hooks that `attach` sets on a model and its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gated_prompt.anatomy import BLOCKS
from gated_prompt.hooks import is_observed, is_ours, is_untouched
from gated_prompt.prompting import GatedPrompts
from gated_prompt.tempering import QueryDivision

_OWNERS = ("torch.", "torchvision.", "timm.", "transformers.", "open_clip.")
_MASKS = ("attention_mask", "attn_mask", "mask", "src_mask")


class AttachedPrompts(GatedPrompts):
    """What `attach` adds to a model, as its child `gated_prompts`; see `GatedPrompts`.

    The forward of the model calls nothing here. Hooks on its blocks do the work.

    Attributes:
        start: The index of the first prompt in the sequence.
        batch_dim: The dimension of the batch in the input of the blocks.
        keep_prompts: False: the prompts are removed after the last block.
        head: The name of the module of the model that stays trainable, or None.
        options: The arguments of `attach`; `attach(other, **model.gated_prompts.options)` attaches
            to another model in the same way. Models of transformers have them in
            `config.gated_prompts`, too, and save them.
    """

    def __init__(self, parts, depth, temperature, start, batch_dim, keep_prompts, device, dtype):
        super().__init__()
        self.start, self.batch_dim, self.keep_prompts = start, batch_dim, keep_prompts
        self._set_parts(*parts, depth, temperature is True, device, dtype)
        self._batch = None  # of the images, if the model's forward is running

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "attach: nn.DataParallel can't copy the hooks that attach has set; use "
            "DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        parts = ("start", "batch_dim", "keep_prompts")
        return ", ".join(f"{name}={getattr(self, name)}" for name in parts)

    def before_model(self, model: nn.Module, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return
        images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4]
        self._batch = len(images[0]) if images else None

    def after_model(self, model: nn.Module, args, out) -> None:
        if not torch.compiler.is_compiling():
            self._batch = None

    def inserted(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N + P, D]."""
        self._tell_what_is_not_tuned("attach")
        if not torch.compiler.is_compiling() and len(x) != self._batch == x.shape[1]:
            shape = list(x.shape if self.batch_dim == 0 else x.transpose(0, 1).shape)
            raise ValueError(
                f"attach: the first block got {shape}, and the model got a batch of {self._batch}; "
                f"batch_dim={self.batch_dim} must be the dimension of the batch"
            )
        if x.shape[1] < self.start:
            raise ValueError(
                f"attach: start must be at most the number of tokens, {x.shape[1]}, got "
                f"{self.start}"
            )
        return self.prompts(x, self.start)[0]

    def removed(self, x: Tensor) -> Tensor:
        """x [B, N + P, D] -> [B, N, D]."""
        return torch.cat([x[:, : self.start], x[:, self.start + self.num_prompts :]], dim=1)


class BlockHooks:
    """The hooks on one block. Bound methods, so that a copied model has hooks that use the copied
    prompts."""

    def __init__(self, prompts, block: nn.Module, index: int, division: QueryDivision | None):
        self.prompts, self.index, self.division = prompts, index, division
        # in a boolean mask of torch.nn, True means "does not attend"; elsewhere, "attends"
        self.true_is_masked = any(isinstance(m, nn.MultiheadAttention) for m in block.modules())

    def before(self, block: nn.Module, args, kwargs):
        if self.division is not None:
            self.division.follow(block)
        x, p = self._batch_first(_tokens(args, kwargs, block)), self.prompts
        if self.index == 0:
            x = p.inserted(x)
        args, kwargs = _with_tokens(args, kwargs, self._batch_first(x))
        sizes = (x.shape[1] - p.num_prompts, p.start, p.num_prompts)
        return _with_wider_masks(args, kwargs, *sizes, self.true_is_masked)

    def after(self, block: nn.Module, args, kwargs, out):
        if self.division is not None:
            self.division.require_used(block)
        x, new = _tokens(args, kwargs, block), _tokens(_as_tuple(out), {}, block)
        if x.shape != new.shape:
            raise ValueError(
                f"attach: block {self.index} must keep the shape of its input {list(x.shape)}, got "
                f"{list(new.shape)}"
            )
        x, new = self._batch_first(x), self._batch_first(new)
        # the gate may overwrite `new` if no other code, such as a hook, can have kept it
        is_own = type(block).__module__.startswith(_OWNERS) and type(block).__name__ in BLOCKS
        is_own = is_own and not torch.compiler.is_compiling() and not is_observed(x)
        is_own = is_own and is_untouched(block) and not new._is_view()
        p = self.prompts
        # no carrier: it gained nothing on a CPU (ViT-S, 50 prompts: 0.675 s a step, 0.673 without)
        new, _ = p._gated(self.index, new, x, None, p.start, p._closed(x), is_own)
        if self.index + 1 == p.depth and not p.keep_prompts:
            new = p.removed(new)
        new = self._batch_first(new)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    def _batch_first(self, x: Tensor) -> Tensor:
        return x if self.prompts.batch_dim == 0 else x.transpose(0, 1)


def _as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def _tokens(args, kwargs, block) -> Tensor:
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"attach: the first input and output of {type(block).__name__} must be tokens "
            f"[B, N, D], got {got}"
        )
    return x


def _with_wider_masks(
    args, kwargs, num_tokens: int, start: int, num_prompts: int, true_is_masked: bool
):  # fmt: skip
    """Lets all tokens attend to the prompts, and the prompts to all tokens, in masks over
    `num_tokens` tokens: the second argument, or one of the names in _MASKS. (Compiled models of
    transformers pass one.)"""

    def wider(mask):
        if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != num_tokens:
            return mask
        for dim in (-1, -2) if mask.shape[-2] == num_tokens else (-1,):
            shape = [*mask.shape]
            shape[dim] = num_prompts
            # a boolean mask, or one that is added to the scores
            free = mask.new_full(shape, mask.dtype == torch.bool and not true_is_masked)
            rest = mask.shape[dim] - start
            mask = torch.cat([mask.narrow(dim, 0, start), free, mask.narrow(dim, start, rest)], dim)
        return mask

    args = (*args[:1], *map(wider, args[1:2]), *args[2:])
    return args, {name: wider(t) if name in _MASKS else t for name, t in kwargs.items()}


def _with_tokens(args, kwargs, x: Tensor):
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


# ---- setting and removing ----


def set_hooks(
    model: nn.Module,
    prompts: AttachedPrompts,
    blocks: list[nn.Module],
    queries: list[str | None],
    temperature: bool | float,
) -> None:
    """Lets the forward of the model use the prompts. queries: in each block, the name of the module
    that projects the queries; None: no temperature."""
    source = prompts.temperatures if temperature is True else float(temperature or 1.0)
    model.register_forward_pre_hook(prompts.before_model, with_kwargs=True)
    model.register_forward_hook(prompts.after_model, always_call=True)
    for index, (block, query) in enumerate(zip(blocks, queries, strict=True)):
        division = None if query is None else QueryDivision(block, query, source, index)
        hooks = BlockHooks(prompts, block, index, division)
        block.register_forward_pre_hook(hooks.before, with_kwargs=True)
        block.register_forward_hook(hooks.after, with_kwargs=True)


def remove_hooks(model: nn.Module) -> None:
    """Undoes `set_hooks`; other hooks stay."""
    for module in model.modules():
        forward = getattr(vars(module).get("forward"), "func", None)
        if forward is not None and is_ours(forward):
            del module.forward
        for hooks, *kinds in (
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if _is_of_attach(hook)]:
                for each in (hooks, *kinds):
                    each.pop(key, None)


def _is_of_attach(hook) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, (AttachedPrompts, BlockHooks, QueryDivision))
