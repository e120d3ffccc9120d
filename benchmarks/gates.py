# SPDX-License-Identifier: Apache-2.0
"""Works of harness.py that run a gate by itself or in a chain of blocks, and their limits."""

import functools

import torch
import torch.nn.functional as F
from harness import Work, assert_near
from peers import COMPACT, COMPILED, PEERS, QUACK, TWO_CARRIERS, compiled, gated_prompt_carrier
from shapes import GATES
from torch.utils.checkpoint import checkpoint

from gated_prompt import ops, reference

BLOCKS = {"cpu": 4, "cuda": 12}  # in a chain


def bytes_moved(case, peer=""):
    """Returns {pass: bytes that the gate must move}. A peer that moves more gets no credit."""
    batch, num_tokens, dim = case.size
    size = {"batch": batch, "num_tokens": num_tokens, "dim": dim, "length": case.prompts}
    size |= {"dtype": case.dtype, "gate": case.gate}
    forward, training, backward = (
        ops.launch_plan(**size, **how)["bytes_moved"]
        for how in ({"save": False}, {"save": True}, {"backward": True})
    )
    # Two carriers: backward reads one more gradient. On CUDA the copy and QuACK move as many bytes,
    # since they are the limits for two carriers.
    if peer == TWO_CARRIERS or (peer in ("device copy", QUACK) and case.device == "cuda"):
        backward += batch * case.prompts * dim * case.torch_dtype.itemsize
    moved = {"forward": forward, "forward, saving": training, "backward": backward}
    return moved | {"forward+backward": training + backward}


def l2_bytes():
    return torch.cuda.get_device_properties(0).L2_cache_size


def calls_of(case):
    """Returns the number of buffers to rotate through: on CUDA enough to touch four times the L2,
    but at most 256, and at least 16, because a graph and its events add some microseconds."""
    if case.device == "cpu":
        return 1  # h has just been written, like the output of a block
    return max(16, min(256, 4 * l2_bytes() // bytes_moved(case)["forward"] + 1))


class Seed(torch.autograd.Function):
    """Passes gradients to a gate's backward that nothing else references, like the gradients that
    the next block would return."""

    @staticmethod
    def forward(ctx, gradients, *outs):
        ctx.gradients = gradients
        return outs[0].new_empty(())

    @staticmethod
    def backward(ctx, _):
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


class GateWork(Work):
    def __init__(self, case, peer):
        super().__init__(case, peer)
        self.one = torch.ones((), dtype=case.torch_dtype, device=self.device)

    def gradients_of(self, out, seed, leaves):
        """Returns the gradients of `leaves`. out: a sequence, or (sequence, carrier). seed: [the
        sequence's gradient] or [the sequence's gradient, the carrier's gradient]."""
        outs = out[: len(seed)] if isinstance(out, tuple) else (out,)
        # without self.one autograd would create and fill a gradient for Seed's result
        return torch.autograd.grad(Seed.apply(seed, *outs), leaves, self.one)

    def gate(self):
        batch, _, dim = self.case.size
        shapes = GATES[self.case.gate](batch, self.case.prompts, dim)
        parameters = [self.randn(*shape, dtype=torch.float32) for shape in shapes]
        if len(parameters) == 2:
            parameters[0] /= dim**0.5  # logits of about 1
        return [parameter.requires_grad_() for parameter in parameters]


class Alone(GateWork):
    """`calls` gates, each with its own buffers."""

    def __init__(self, case, peer):
        super().__init__(case, peer)
        function, mode = PEERS[peer]
        gate, start, length, rule = self.gate(), case.start, case.prompts, case.rule
        # these functions do not refer to self, so that a work is freed with its last reference
        if function is gated_prompt_carrier:
            self.run = lambda h, x: function(h, x, gate, start, length, rule, x)
        else:
            function = compiled(function, mode)
            self.run = lambda h, x: function(h, x, gate, start, length, rule)
        self.parameters, self.calls = gate, calls_of(case)
        self.h = self.randn(*case.size).requires_grad_()
        xs = [self.randn(*case.size) for _ in range(self.calls)]
        # partly along h - x, so that the sums in the gate's gradient do not cancel: an error shows
        self.gradient = self.randn(*case.size) + self.h.detach() - xs[-1]
        self.rows = slice(start, start + length)
        if peer in COMPACT:
            # x has only the prompt rows, and so has its gradient
            xs = (x[:, self.rows].clone() for x in xs)
        self.xs = [x.requires_grad_() for x in xs]
        # the gradient of the second carrier, which the gate reads and never writes
        is_second = peer == TWO_CARRIERS
        self.of_carrier = [self.gradient[:, self.rows].clone()] if is_second else []

    def prepare(self):
        self.fresh = [self.h.clone() for _ in self.xs]  # not leaves, like the output of a block
        self.seeds = [[self.gradient.clone(), *self.of_carrier] for _ in self.xs]

    def forward(self):
        self.outs = [self.run(h, x) for h, x in zip(self.fresh, self.xs, strict=True)]
        last = self.outs[-1]
        self.result = last[0] if isinstance(last, tuple) else last

    def backward(self):
        for out, x, seed in zip(self.outs, self.xs, self.seeds, strict=True):
            self.gradients = self.gradients_of(out, seed, (self.h, x, *self.parameters))

    def verify(self):
        """Checks the last call, within the rounding of the dtype."""
        leaves = (self.h, self.xs[-1], *self.parameters)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        oracle = reference.prompt_gate if len(exact) == 3 else reference.prompt_gate_linear
        wanted = oracle(*exact, self.case.start, self.case.prompts, self.case.rule)
        eps = torch.finfo(self.case.torch_dtype).eps
        for got in (self.inferred, self.result):
            torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=8 * eps)
        gradient = self.gradient.double()
        for more in self.of_carrier:
            gradient[:, self.rows] += more
        gradients = torch.autograd.grad(wanted, exact, gradient)
        for got, gradient in zip(self.gradients, gradients, strict=True):
            error = (got.double() - gradient).norm() / gradient.norm()
            assert error < max(8 * eps, 1e-5), f"relative error {error:.3g}"


class Copy(Work):
    """The limit of a gate: a copy on the device of as many bytes as the gate must move."""

    def __init__(self, case, peer="device copy"):
        super().__init__(case, peer)
        self.calls, moved = calls_of(case), bytes_moved(case, peer)
        # Half of the bytes are read and half are written. Sizes are multiples of 64 KiB: on an H200
        # multiples of 512 bytes were copied at 0.66 of the rate of a large copy, multiples of 4 KiB
        # at 0.95.
        self.sizes = {which: -(-count // 2**17) * 2**16 for which, count in moved.items()}
        del self.sizes["forward+backward"]  # runs the copies of the two passes
        size = (self.calls, max(self.sizes.values()))
        options = {"dtype": torch.uint8, "device": self.device}
        self.source = torch.randint(0, 256, size, generator=self.generator, **options)
        self.target = torch.zeros_like(self.source)

    def copy(self, which):
        size = self.sizes[which]
        for source, target in zip(self.source, self.target, strict=True):
            target[:size].copy_(source[:size])

    def infer(self):
        self.copy("forward")

    def forward(self):
        self.copy("forward, saving")

    def backward(self):
        self.copy("backward")

    def verify(self):
        assert torch.equal(self.target, self.source)


class QuackSoftmax(Work):
    """QuACK's softmax over rows of D elements. Forward reads one tensor and writes one; backward
    reads two and writes one. It has as many rows as the bytes that the gate must move allow."""

    def __init__(self, case, peer=QUACK):
        super().__init__(case, peer)
        from quack.softmax import softmax_bwd, softmax_fwd

        self.softmax, self.softmax_backward = softmax_fwd, softmax_bwd
        self.calls, moved, dim = calls_of(case), bytes_moved(case, peer), case.size[2]
        row = dim * case.torch_dtype.itemsize
        self.rows = {which: moved[which] // (2 * row) for which in ("forward", "forward, saving")}
        self.rows["backward"] = moved["backward"] // (3 * row)
        size = self.calls, max(self.rows.values()), dim
        self.xs, self.gradients = self.randn(*size), self.randn(*size)

    def run(self, rows):
        self.outs = [self.softmax(x[:rows]) for x in self.xs]
        self.result = self.outs[-1]

    def infer(self):
        self.run(self.rows["forward"])

    def forward(self):
        self.run(self.rows["forward, saving"])

    def backward(self):
        rows = self.rows["backward"]
        for gradient, out in zip(self.gradients, self.outs, strict=True):
            self.of_x = self.softmax_backward(gradient[:rows], out[:rows])

    def verify(self):
        out, rows = self.xs[-1].double().softmax(-1), self.rows["backward"]
        gradient, y = self.gradients[-1, :rows].double(), out[:rows]
        exact = y * (gradient - (y * gradient).sum(-1, keepdim=True))
        for got, wanted in ((self.result, out[: len(self.result)]), (self.of_x, exact)):
            error = (got.double() - wanted).norm() / wanted.norm()
            assert error < 8 * torch.finfo(self.case.torch_dtype).eps, f"error {error:.3g}"


class Gemms(GateWork):
    """The limit of a linear gate: its GEMMs, one with a bias in forward, two in backward."""

    def __init__(self, case, peer="bare GEMMs"):
        super().__init__(case, peer)
        self.calls = calls_of(case)
        self.weight, self.bias = (t.detach().to(case.torch_dtype) for t in self.gate())
        batch, _, dim = case.size
        rows = batch * case.prompts
        self.hs = [self.randn(rows, dim) for _ in range(self.calls)]
        self.gradients = [self.randn(rows, len(self.weight)) for _ in range(self.calls)]

    def forward(self):
        for h in self.hs:
            self.result = F.linear(h, self.weight, self.bias)

    def backward(self):
        for h, gradient in zip(self.hs, self.gradients, strict=True):
            self.of_h, self.of_weight = gradient @ self.weight, gradient.T @ h

    def verify(self):
        h, gradient, weight = (t.double() for t in (self.hs[-1], self.gradients[-1], self.weight))
        wanted = (h @ weight.T + self.bias.double(), gradient @ weight, gradient.T @ h)
        for got, exact in zip((self.result, self.of_h, self.of_weight), wanted, strict=True):
            error = (got.double() - exact).norm() / exact.norm()
            assert error < max(8 * torch.finfo(self.case.torch_dtype).eps, 1e-5), (
                f"error {error:.3g}"
            )


class Chain(GateWork):
    """Prompts inserted into a sequence, then blocks x + layer_norm(x), each followed by a gate. In
    a ViT, too, a residual add precedes the gate and a layer norm follows it.

    A call is one block with its gate. The peer "no gate" has no gates: the additional time of
    another peer is the cost of its gate.
    """

    def __init__(self, case, peer):
        super().__init__(case, peer)
        self.calls = BLOCKS[case.device]
        self.sequence, self.gradient = self.randn(*case.size), self.randn(*case.size)
        prompts = self.sequence[:, case.start : case.start + case.prompts].clone()
        gates = [self.gate() for _ in range(self.calls)]
        self.leaves = [prompts.requires_grad_(), *(p for gate in gates for p in gate)]
        function, mode = PEERS[peer] if peer in PEERS else (None, COMPILED.get(peer[7:]))
        if function is None:
            self.leaves = self.leaves[:1]
        self.run = compiled(self.through(function), mode)

    def through(self, function, run=lambda block, *arguments: block(*arguments)):
        start, length, rule = self.case.start, self.case.prompts, self.case.rule
        # as in Alone, the functions below do not refer to self
        per_gate, calls = len(GATES[self.case.gate](1, 1, 1)), self.calls

        def block(x, *gate):
            h = x + F.layer_norm(x, x.shape[-1:])
            return h if function is None else function(h, x, gate, start, length, rule)

        def chain(sequence, prompts, *parameters):
            before, _, after = sequence.tensor_split((start, start + length), dim=1)
            x, carrier = torch.cat([before, prompts, after], dim=1), prompts
            for i in range(calls):
                gate = parameters[i * per_gate : (i + 1) * per_gate]
                if function is gated_prompt_carrier:
                    h = x + F.layer_norm(x, x.shape[-1:])
                    x, carrier = function(h, x, gate, start, length, rule, carrier)
                else:
                    x = run(block, x, *gate)
            return x

        return chain

    def prepare(self):
        self.seed = [self.gradient.clone()]

    def forward(self):
        self.result = self.run(self.sequence, *self.leaves)

    def backward(self):
        self.gradients = self.gradients_of(self.result, self.seed, self.leaves)

    def verify(self):
        """Allows twice the error of the eager original, measured against float64."""
        groups = [self.inferred, self.result, self.gradients[0], _joined(self.gradients[1:])]
        for got, near, exact in zip(groups, *self.wanted, strict=True):
            if exact is not None:
                assert_near(got, near, exact)

    @functools.cached_property
    def wanted(self):
        """The results of the original, in the case's dtype and in float64."""
        sparing = functools.partial(checkpoint, use_reentrant=False)  # float64 needs much memory
        function = PEERS["original"][0] if len(self.leaves) > 1 else None
        original = self.through(function, sparing)
        found = []
        for dtype in (self.case.torch_dtype, torch.float64):
            wide = torch.promote_types(dtype, torch.float32)
            leaves = [t.detach().to(wide if i else dtype) for i, t in enumerate(self.leaves)]
            leaves = [t.requires_grad_() for t in leaves]
            result = original(self.sequence.to(dtype), *leaves)
            gradients = torch.autograd.grad(result, leaves, self.gradient.to(dtype))
            result = result.detach()
            found.append([result, result, gradients[0], _joined(gradients[1:])])
        return found


def _joined(gradients):
    return torch.cat([g.flatten() for g in gradients]) if gradients else None
