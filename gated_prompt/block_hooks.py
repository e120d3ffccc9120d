# SPDX-License-Identifier: Apache-2.0
"""The hooks that `attach` sets on a model and its blocks."""

from __future__ import annotations

import dataclasses
import threading

import torch
from torch import Tensor, nn

from gated_prompt.anatomy import BLOCKS
from gated_prompt.hooks import is_observed, is_untouched, remove_hooks
from gated_prompt.prompting import GatedPrompts
from gated_prompt.tempering import QueryDivision, remove_forward
from gated_prompt.torch_private import backward_id

_OWNERS = ("torch.", "torchvision.", "timm.", "transformers.", "open_clip.")
_MASKS = ("attention_mask", "attn_mask", "mask", "src_mask")


@dataclasses.dataclass
class _Running:
    """A forward: the batch size of its images (None: not known, the model's forward was not
    called), the next block, and the number of tokens with the prompts."""

    batch: int | None
    block: int = 0
    num_tokens: int = 0


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
        self._running: dict[int, _Running] = {}  # thread: the forward that runs in it

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "attach: nn.DataParallel can't copy the hooks that attach has set; use "
            "DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        parts = ("start", "batch_dim", "keep_prompts")
        return ", ".join(f"{name}={getattr(self, name)}" for name in parts)

    def before_model(self, model: nn.Module, args, kwargs) -> None:
        if not _is_checked():
            return
        images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4]
        running = _Running(len(images[0]) if images else None)
        self._running[threading.get_ident()] = running

    def after_model(self, model: nn.Module, args, out) -> None:
        if not _is_checked():
            return
        running = self._running.pop(threading.get_ident(), None)
        if running is None or out is None:  # out is None after an exception
            return
        has_begun = (
            running.batch is not None or running.block > 0
        )  # not so for a text without image
        if has_begun and running.block != self.depth:
            raise RuntimeError(
                f"attach: the forward of {type(model).__name__} ran {running.block} of "
                f"{self.depth} blocks, so the prompts were not inserted, or are still there; if "
                "blocks were replaced, detach and attach again"
            )

    def follow(self, index: int, x: Tensor) -> None:
        """Raises if the blocks do not run in their order, each once, on the same tokens x [B, N +
        P, D]; otherwise prompts would be gated or removed at wrong places. A block that is called
        outside a forward, or is recomputed for backward, is not checked."""
        if not _is_checked():
            return
        thread = threading.get_ident()
        running = self._running.get(thread)
        if index == 0 and (running is None or running.block > 0):  # not the model's own forward
            running = self._running[thread] = _Running(None)
        if running is None:
            return
        if index != running.block or (index > 0 and x.shape[1] != running.num_tokens):
            was = f"block {running.block} with {running.num_tokens} tokens"
            raise RuntimeError(
                f"attach: blocks must run one after the other on the same tokens, wanted "
                f"{was if index else f'block {running.block}'}, got block {index} with "
                f"{x.shape[1]}; if blocks were replaced, detach and attach again"
            )
        running.block, running.num_tokens = index + 1, x.shape[1]
        if index + 1 == self.depth and running.batch is None:
            del self._running[thread]

    def inserted(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N + P, D]."""
        self._tell_what_is_not_tuned("attach")
        running = self._running.get(threading.get_ident()) if _is_checked() else None
        batch = None if running is None else running.batch
        if len(x) != batch == x.shape[1]:
            shape = list(x.shape if self.batch_dim == 0 else x.transpose(0, 1).shape)
            raise ValueError(
                f"attach: the first block got {shape}, and the model got a batch of {batch}; "
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


def _is_checked() -> bool:
    """False in compiled code, and while backward recomputes blocks in another order."""
    return not torch.compiler.is_compiling() and backward_id() < 0


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
        p.follow(self.index, x)
        args, kwargs = _with_tokens(args, kwargs, self._batch_first(x))
        return _with_wider_masks(args, kwargs, x, p, self.true_is_masked)

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
        # no carrier: it would have to travel with the tokens, through code that is not ours
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


def _with_wider_masks(args, kwargs, x: Tensor, prompts: AttachedPrompts, true_is_masked: bool):
    """Widens the masks of attention, in the second argument or under one of the names in _MASKS:
    all tokens attend to the prompts, and the prompts to the tokens to which any token attends.
    (Compiled models of transformers pass a mask.)

    A mask is [..., N, N], [..., 1, N] or [B, N], for x [B, N + P, D]. It is boolean, or is added to
    the scores.
    """
    start, num_prompts = prompts.start, prompts.num_prompts
    num_tokens = x.shape[1] - num_prompts

    def wider(mask, is_of_keys):
        if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != num_tokens:
            return mask
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"attach: a mask must be boolean, or floating to be added, got {mask.dtype}"
            )
        is_free = mask.dtype == torch.bool and not true_is_masked
        free = mask.new_full((*mask.shape[:-1], num_prompts), is_free)
        mask = torch.cat([mask[..., :start], free, mask[..., start:]], dim=-1)
        if mask.shape[-2] != num_tokens or (mask.dim() == 2 and is_of_keys):
            return mask
        widest = mask.amin if mask.dtype == torch.bool and true_is_masked else mask.amax
        rows = widest(-2, keepdim=True).expand(*mask.shape[:-2], num_prompts, -1)
        return torch.cat([mask[..., :start, :], rows, mask[..., start:, :]], dim=-2)

    args = (*args[:1], *(wider(t, not true_is_masked) for t in args[1:2]), *args[2:])
    masks = {n: wider(t, n == "attention_mask") for n, t in kwargs.items() if n in _MASKS}
    return args, {**kwargs, **masks}


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


def unset_hooks(model: nn.Module) -> None:
    """Undoes `set_hooks`; other hooks stay."""
    for module in model.modules():
        remove_forward(module)
        remove_hooks(module, _is_of_attach)


def has_hooks(model: nn.Module) -> bool:
    """True if `set_hooks` has set hooks on a part of the model."""
    return any(
        _is_of_attach(hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _is_of_attach(hook) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, (AttachedPrompts, BlockHooks, QueryDivision))
