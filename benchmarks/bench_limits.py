# SPDX-License-Identifier: Apache-2.0
"""The limits of the machine: a large copy, a large GEMM, and the cost of a call.

    pytest benchmarks/bench_limits.py --benchmark-only [--dtypes ...]

gb_per_s counts the bytes read and the bytes written; tflop_per_s counts 2 for a multiply-add.
"call" is an op on one element, which is the least that any op costs; on CUDA, host_us is its time
on the host.
"""

import pytest
import torch
from harness import Work, label, race, timed_here
from shapes import chosen

pytestmark = timed_here


class Copy(Work):
    ahead = True  # without it, 31 of 530 us on an H200 were host time

    def __init__(self, case, what):
        super().__init__(case, what)
        self.size = {"cpu": 2**28, "cuda": 2**30}[case.device]  # bytes
        options = {"dtype": torch.uint8, "device": case.device, "generator": self.generator}
        self.source = torch.randint(0, 256, (self.size,), **options)
        self.target = torch.zeros_like(self.source)

    def forward(self):
        self.result = self.target.copy_(self.source)

    def backward(self):
        pass

    def verify(self):
        assert torch.equal(self.result, self.source)

    def rate(self, seconds):
        return {"gb_per_s": 2 * self.size / seconds / 1e9}


class Gemm(Copy):
    def __init__(self, case, what):
        Work.__init__(self, case, what)
        self.n = {"cpu": 1024, "cuda": 8192}[case.device]
        self.a, self.b = self.randn(self.n, self.n), self.randn(self.n, self.n)

    def forward(self):
        self.result = self.a @ self.b

    def verify(self):
        wanted = self.a[:8].double() @ self.b.double()
        error = (self.result[:8].double() - wanted).norm() / wanted.norm()
        # 1e-5: the error of a sequential float32 sum of 8192 products
        assert error < max(8 * torch.finfo(self.a.dtype).eps, 1e-5)

    def rate(self, seconds):
        return {"tflop_per_s": 2 * self.n**3 / seconds / 1e12}


class Call(Copy):
    calls, ahead = 100, False

    def __init__(self, case, what):
        Work.__init__(self, case, what)
        self.x = torch.zeros((), device=case.device)

    def prepare(self):
        self.x.zero_()

    def forward(self):
        for _ in range(self.calls):
            self.result = self.x.add_(1)

    def verify(self):
        assert self.result == self.calls

    def rate(self, seconds):
        return {}


WORKS = {"copy": Copy, "GEMM": Gemm, "call": Call}


def pytest_generate_tests(metafunc):
    cases = [(c.device, c) for c in chosen(metafunc.config, "limits")]
    metafunc.parametrize(("device", "case"), cases, indirect=True, ids=str)


def names(case, what):
    """Returns the fields that identify a row in the results."""
    return {"suite": "limits", "case": case.dtype, "peer": what}


@pytest.mark.parametrize("what", WORKS)
def test_limit(benchmark, device, case, what):
    label(benchmark, **names(case, what))
    work = WORKS[what](case, what)
    benchmark.extra_info |= work.rate(race(benchmark, work, work, "forward"))
