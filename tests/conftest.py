# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule of the test suite, and the devices that the tests run on."""

import os

import pytest
import torch

from gated_prompt import ops

# Makes cuBLAS deterministic. cuBLAS reads the variable once per process, at the first GEMM.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CUDA_SKIP_REASON = "no CUDA GPU" if not torch.cuda.is_available() else ops.cuda_unavailable_reason


def timm_or_skip():
    """Returns timm, or skips the test module.

    timm imports torchvision, which may not import next to a CPU-only torch.
    """
    try:
        import timm
    except Exception as error:
        pytest.skip(f"timm does not import: {error}", allow_module_level=True)
    return timm


def pytest_collection_modifyitems(items):
    if CUDA_SKIP_REASON is not None:
        skip = pytest.mark.skip(reason=CUDA_SKIP_REASON)
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _full_precision():
    """Disables TF32 and reduced-precision sums of 16-bit GEMMs, so that results are comparable."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """Runs on one thread: small batches are many times slower on two threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_within_rule(
    name, got, reference, eager, terms, *, backward, reduced=False, carried=0.0, dtype=None
):
    """Asserts that `got` is as close to the float64 `reference` as its dtype and the eager form
    allow.

    Like flash-attention, the rule compares the error with the error of PyTorch in the same dtype.
    Both bounds must be met, with K, C = 2, 8 (forward) or 3, 32 (backward):
        ratio: max|got - ref| <= K * max|eager - ref| + 2 * eps * max|ref| + acc
        cap:   |got - ref| <= max(C * eps * terms, 2 * |eager - ref|) + acc, elementwise
    acc is 0. If `reduced`, acc is 8 float32 epsilons of `terms`, and the ratio uses `terms` in
    place of |ref|, because the eager form of a sum that cancels is exact only by luck. The ratio
    also allows 8 float32 epsilons of max(carried); for the cap, `terms` must include them. float64
    has no reference of higher precision: the error must be at most 1e-12 (forward) or 1e-11
    (backward) of `terms`.

    Args:
        reference, eager: The same value in float64, and by eager ops in the dtype under test.
        terms: For each element, the sum of the absolute values that are added up, float64.
        carried: The same for an intermediate sum, times the element's derivative by that sum:
            eager may add it up in another order.
        dtype: The coarsest dtype of the inputs, if it is coarser than the dtype of `got`.
    """
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, eager has {eager.dtype}"
    assert got.shape == reference.shape, f"{name}: {got.shape}, reference has {reference.shape}"
    dtype = max((got.dtype, dtype or got.dtype), key=lambda t: torch.finfo(t).eps)
    error = (got.double() - reference).abs()
    assert not error.isnan().any(), f"{name}: NaN"
    if got.numel() == 0:
        return
    if dtype == torch.float64:
        allowed = (1e-11 if backward else 1e-12) * terms
        assert (error <= allowed).all(), f"{name}: error {error.max():.3g}"
        return
    eps = torch.finfo(dtype).eps
    k, c = (3, 32) if backward else (2, 8)
    of_sums = 8 * torch.finfo(torch.float32).eps
    accumulated = of_sums * terms if reduced else 0 * terms
    eager_error = (eager.double() - reference).abs()
    scale = terms if reduced else reference.abs()
    ratio = k * eager_error.max() + 2 * eps * scale.max() + accumulated.max()
    ratio += of_sums * torch.as_tensor(carried).max()
    assert error.max() <= ratio, f"{name}: error {error.max():.3g} above ratio bound {ratio:.3g}"
    cap = torch.maximum(c * eps * terms, 2 * eager_error) + accumulated
    worst = (error - cap).argmax()
    assert (error <= cap).all(), (
        f"{name}: error {error.flatten()[worst]:.3g} above cap {cap.flatten()[worst]:.3g}"
    )
