# SPDX-License-Identifier: Apache-2.0
"""The gate written by hand in Triton, in place, as fast as we could make it: the peer "triton".

Forward reads h and x. It writes the prompt rows and, for the logit's gradient, (h - x) / 2 or h.
Backward reads this tensor and the incoming gradient. It writes the gradient of x, including zeros
for the other rows, and overwrites the incoming gradient with the gradient of h. In general this is
unsafe, because another user of the incoming gradient would see it change. In the benchmarks it has
no other user, so this peer need not check, which our op does.

The kernels treat memory as *runs*: the P*D elements of a sample, or the D elements of a row if the
logit's gradient has a sum for each row or channel. A program works on a tile of some runs and some
columns, and stores its partial sum. A second kernel adds the partial sums in a fixed order.

Each shape, dtype and pass uses the fastest of a few tilings. The first call times them on a copy of
the tensor that is written in place, so it must come before the capture of a CUDA graph.
triton.autotune would include its own saving and restoring of the sequence in the time, which takes
longer than the gate.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

# The compile-time constants of a kernel. A sample has `runs` runs of `run` elements; a tile has
# `rows` runs and `cols` columns, and `across` tiles cover a run. dense_x: x is a sequence.
NAMES = "kind mix dense_x batch tokens dim start runs run rows cols warps across tiles"
Tiling = dataclasses.make_dataclass("Tiling", NAMES.split(), frozen=True, eq=False)

INTERPRETED = triton.knobs.runtime.interpret  # small tiles, so that small tests have several tiles
PARTS = 32 if INTERPRETED else 4096  # partial sums added at a time


def tilings(kind, length, dim, **same):
    """Yields four tilings. In forward a program reads 4, 8, 16 or 32 KB of two bfloat16 tensors. An
    SM of an H100 or H200 needs 15 to 25 KB in flight; its programs together have more with each of
    the tilings. Small tiles distribute evenly at B=64 (2,400 tiles on 132 SMs, for 50 rows of 768);
    large tiles are fewer at B=256 and leave fewer partial sums. Each further tiling would mean 30
    more kernels to compile."""
    by_row = kind in ("token", "channel")
    runs, run = (length, dim) if by_row else (1, length * dim)
    whole = triton.next_power_of_2(run)
    if INTERPRETED:  # nothing to time
        tiles = [{"token": (2, whole, 1), "channel": (2, 8, 1)}.get(kind, (1, 16, 1))]
    else:
        sizes = [(32 * warps * each, warps) for warps, each in ((4, 8), (4, 16), (8, 16), (8, 32))]
        width = {"token": whole, "channel": 128}.get(kind)
        tiles = [(s // (width or s), width or s, warps) for s, warps in sizes if s >= (width or s)]
    for rows, cols, warps in tiles:
        across = triton.cdiv(run, cols)
        count = triton.cdiv(same["batch"] * runs, rows) * across
        yield Tiling(kind, dim=dim, runs=runs, run=run, rows=rows, cols=cols, warps=warps,
                     across=across, tiles=count, **same)  # fmt: skip


@triton.jit
def _places(tile, at: tl.constexpr):
    """Returns a tile's runs and columns, and for each of its elements the offset in [B, N, D], the
    offset in [B, P, D], and the mask."""
    run = tile // at.across * at.rows + tl.arange(0, at.rows)
    column = tile % at.across * at.cols + tl.arange(0, at.cols)
    token = (run // at.runs).to(tl.int64) * at.tokens + at.start
    sequence = token * at.dim + run % at.runs * at.run
    rows = run.to(tl.int64) * at.run
    mask = (run < at.batch * at.runs)[:, None] & (column < at.run)[None, :]
    return run, column, sequence[:, None] + column, rows[:, None] + column, mask


@triton.jit
def _gate(logit, tile, run, column, rows, mask, at: tl.constexpr):
    if at.kind == "scalar":
        z = tl.load(logit)
    elif at.kind == "sample":  # a run is a whole sample, and a tile lies within one run
        z = tl.load(logit + tile // at.across)
    elif at.kind == "token":
        z = tl.load(logit + run % at.runs)
    elif at.kind == "channel":
        z = tl.load(logit + column, mask=column < at.run)
    else:
        z = tl.load(logit + rows, mask=mask)
    g = tl.sigmoid(z.to(tl.float32))
    return g[:, None] if at.kind == "token" else g


@triton.jit
def _forward(h, x, saved, logit, at: tl.constexpr):
    tile = tl.program_id(0)
    run, column, sequence, rows, mask = _places(tile, at)
    x_at = x + (sequence if at.dense_x else rows)
    old = tl.load(h + sequence, mask=mask).to(tl.float32)
    into = tl.load(x_at, mask=mask, eviction_policy="evict_first").to(tl.float32)
    g = _gate(logit, tile, run, column, rows, mask, at)
    tl.store(h + sequence, g * old + ((1 - g) * into if at.mix else into), mask=mask)
    if saved is not None:  # half, since the difference of two float16 may exceed float16's range
        derivative = 0.5 * old - 0.5 * into if at.mix else old
        tl.store(saved + rows, derivative, mask=mask, eviction_policy="evict_first")


@triton.jit
def _backward(grad, grad_x, saved, logit, parts, rescale: tl.constexpr, at: tl.constexpr):
    """parts: the partial sums of the logit's gradient; for a full gate, the gradient itself."""
    tile = tl.program_id(0)
    if tile >= at.tiles:
        _clear(grad_x, tile - at.tiles, at)
    else:
        run, column, sequence, rows, mask = _places(tile, at)
        old = tl.load(grad + sequence, mask=mask, other=0, eviction_policy="evict_first")
        old = old.to(tl.float32)
        if saved is not None:
            terms = tl.load(saved + rows, mask=mask, other=0, eviction_policy="evict_first")
            terms = terms.to(tl.float32) * old
        g = _gate(logit, tile, run, column, rows, mask, at)
        if rescale:
            tl.store(grad + sequence, g * old, mask=mask)
        if grad_x is not None:
            x_at = grad_x + (sequence if at.dense_x else rows)
            tl.store(x_at, (1 - g) * old if at.mix else old, mask=mask)
        if saved is not None:
            if at.kind == "full":
                slope = g * (1 - g) * (2 if at.mix else 1)
                tl.store(parts + rows, slope * terms, mask=mask)
            elif at.kind == "token":
                tl.store(parts + run, tl.sum(terms, 1), mask=run < at.batch * at.runs)
            elif at.kind == "channel":
                part = parts + tile // at.across * at.run + column
                tl.store(part, tl.sum(terms, 0), mask=column < at.run)
            else:
                tl.store(parts + tile, tl.sum(terms))


@triton.jit
def _clear(x, tile, at: tl.constexpr):
    """Writes zeros into a sequence, except its prompt rows."""
    size: tl.constexpr = at.rows * at.cols
    across: tl.constexpr = (at.tokens * at.dim + size - 1) // size
    column = tile % across * size + tl.arange(0, size)
    first: tl.constexpr = at.start * at.dim
    mask = (column < first) | (column >= first + at.runs * at.run)
    x += (tile // across).to(tl.int64) * (at.tokens * at.dim)
    tl.store(x + column, 0.0, mask=mask & (column < at.tokens * at.dim))


@triton.jit
def _add(parts, logit, grad, sums: tl.constexpr, count: tl.constexpr, stride: tl.constexpr,
         part_stride: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
         at: tl.constexpr):  # fmt: skip
    """Computes the gradients of `sums` logits, each from `count` partial sums."""
    of = tl.program_id(0) * wide + tl.arange(0, wide)
    total = tl.zeros([deep, wide], tl.float32)
    for first in range(0, count, deep):
        part = first + tl.arange(0, deep)[:, None]
        part_at = parts + of * stride + part * part_stride
        total += tl.load(part_at, mask=(of < sums) & (part < count), other=0)
    g = tl.sigmoid(tl.load(logit + of, mask=of < sums).to(tl.float32))
    slope = g * (1 - g) * (2 if at.mix else 1)
    tl.store(grad + of, slope * tl.sum(total, 0), mask=of < sums)


class Plan:
    """Launches the kernels for tensors of one combination of shapes and dtype."""

    def __init__(self, size, in_size, gate_size, dtype, device, start, length, rule):
        batch, tokens, dim = size
        self.in_size, self.rows_size = in_size, (batch, length, dim)
        kinds = {(): "scalar", (dim,): "channel", (length, 1): "token"}
        kinds |= {self.rows_size: "full", (batch, 1, 1): "sample"}
        same = {"mix": rule == "mix", "dense_x": in_size == size, "start": start}
        same |= {"batch": batch, "tokens": tokens}
        self.tilings = list(tilings(kinds[tuple(gate_size)], length, dim, **same))
        self.fastest, self.compiled = {}, {}

    def run(self, which, launch, written):
        """Calls launch(written, tiling) with the fastest tiling for `which`, the kind of launch."""
        if which not in self.fastest:
            times = [0]
            if len(self.tilings) > 1:
                copy, how = written.clone(), {"warmup": 10, "rep": 40, "return_mode": "median"}
                times = [do_bench(lambda at=at: launch(copy, at), **how) for at in self.tilings]
            self.fastest[which] = self.tilings[times.index(min(times))]
        launch(written, self.fastest[which])

    def start(self, kernel, programs, warps, *arguments):
        """Launches a kernel. Later calls skip most of the Python code in which Triton looks up the
        compiled kernel."""
        key = [(a.dtype, a.data_ptr() % 16) if hasattr(a, "dtype") else a for a in arguments]
        key = (kernel, warps, *key)
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = kernel[programs,](*arguments, num_warps=warps)
        else:
            compiled[programs, 1, 1](*arguments)

    def forward(self, h, x, logit, save):
        saved = h.new_empty(self.rows_size) if save else None

        def launch(h, at):
            self.start(_forward, at.tiles, at.warps, h, x, saved, logit, at)

        self.run(("forward", save), launch, h)
        return saved

    def backward(self, grad, saved, logit, needs_h, needs_x):
        """Returns the gradients of x and the logit, and writes the gradient of h into `grad`."""
        grad_x = grad.new_empty(self.in_size) if needs_x else None
        grad_logit = None if saved is None else torch.empty_like(logit)

        def launch(grad, at):
            parts, programs = grad_logit, at.tiles
            if needs_x and at.dense_x:
                programs += at.batch * triton.cdiv(at.tokens * at.dim, at.rows * at.cols)
            adds = saved is not None and at.kind != "full"
            if adds:
                sums, count, *strides = {
                    "scalar": (1, at.tiles, 0, 1),
                    "sample": (at.batch, at.across, at.across, 1),
                    "token": (at.runs, at.batch, 1, at.runs),
                    "channel": (at.run, at.tiles // at.across, 1, at.run),
                }[at.kind]
                parts = logit.new_empty(sums * count, dtype=torch.float32)
            tensors = (grad, grad_x, saved, logit, parts)
            self.start(_backward, programs, at.warps, *tensors, needs_h, at)
            if adds:
                wide = 16 if strides[0] == 1 else 1
                deep = min(triton.next_power_of_2(count), PARTS // wide)
                sizes = (sums, count, *strides, wide, deep)
                self.start(_add, triton.cdiv(sums, wide), 4, parts, logit, grad_logit, *sizes, at)

        self.run(("backward", saved is not None, needs_h, needs_x), launch, grad)
        return grad_x, grad_logit


_plan = functools.lru_cache(maxsize=None)(Plan)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, x, logit, plan):
        saved = plan.forward(h, x, logit, ctx.needs_input_grad[2])
        ctx.plan = plan
        ctx.mark_dirty(h)
        ctx.save_for_backward(saved, logit)
        return h

    @staticmethod
    def backward(ctx, grad):
        grad, (needs_h, needs_x, *_) = grad.contiguous(), ctx.needs_input_grad
        of_x, of_logit = ctx.plan.backward(grad, *ctx.saved_tensors, needs_h, needs_x)
        return grad if needs_h else None, of_x, of_logit, None


def gate_(h, x, logit, start, length, rule):
    """Writes the prompt rows of h [B, N, D] and returns h. x is [B, N, D] or [B, P, D]; logit is
    [], [D], [P, 1], [B, 1, 1] or [B, P, D]. All must be contiguous, h and x of the same dtype."""
    plan = _plan(h.shape, x.shape, logit.shape, h.dtype, h.device, start, length, rule)
    if torch.is_grad_enabled():
        return _Gate.apply(h, x, logit, plan)
    plan.forward(h, x, logit, False)
    return h
