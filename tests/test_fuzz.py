# SPDX-License-Identifier: Apache-2.0
"""Compares random cases of the op with float64, and checks that they find planted faults.

FUZZ_CASES=20000 runs that many cases with a random seed. Without it, the cases are always the same.
"""

import functools
import os

import pytest
import torch
from cases import (
    DTYPES,
    GATES,
    IN_FORMS,
    LAYOUTS,
    RULES,
    VALUES,
    WRITABLE,
    Case,
    check_against_reference,
    same_bits,
)

pytest.importorskip("hypothesis")  # an ImportError would stop the whole test run
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import gated_prompt as gp
from gated_prompt import autograd

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
fuzz = functools.partial(
    settings,
    derandomize="FUZZ_CASES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


@st.composite
def cases(draw):
    pick = st.sampled_from
    # not st.integers, which would make four in five cases empty
    num_tokens = draw(pick((1, 2, 3, 4, 5, 6, 7, 0)))
    first = draw(pick((*range(num_tokens), *range(num_tokens + 1))))
    from_end = draw(st.booleans()) and first < num_tokens
    inplace = draw(st.booleans())
    changes = {
        "batch": pick((1, 2, 3, 1, 2, 3, 0)),
        "dim": pick((1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 32, 33, 64, 0)),
        "length": pick((*range(1, num_tokens - first + 1), *range(num_tokens - first + 1))),
        "rule": pick(RULES),
        "dtype": pick(DTYPES),
        "in_dtype": pick((None, *DTYPES)),
        "gate_dtype": pick((None, *DTYPES)),
        "logit": pick((-10.0, -0.7, 0.0, 3.0)),
        "layout": pick(WRITABLE if inplace else tuple(LAYOUTS)),
        "in_layout": pick(tuple(LAYOUTS)),
        "grad_layout": pick(tuple(LAYOUTS)),
        "in_form": pick(IN_FORMS if inplace else IN_FORMS[:3]),
        "gate": pick(tuple(GATES)),
        "bias": st.booleans(),
        "gate_layout": pick(tuple(LAYOUTS)),
        "offset": st.integers(0, 15),
        "values": pick(VALUES),
        "needs": st.tuples(*[st.booleans()] * 4) | st.just((True,) * 4),
        "autocast": st.booleans(),
    }
    return Case(
        num_tokens=num_tokens,
        start=first - num_tokens if from_end else first,
        inplace=inplace,
        **{name: draw(strategy) for name, strategy in changes.items()},
    )


PARTS = 4  # so that each stays within the time limit of a test on a GPU


@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases_equal_the_reference(device, part):
    @fuzz(max_examples=CASES // PARTS)
    @given(cases())
    def check(case):
        case.device = device
        check_against_reference(case)

    # each part gets its own seed; random cases differ anyway
    (check if "FUZZ_CASES" in os.environ else seed(part)(check))()


def nests(shape, strides):
    """True if each stride exceeds the reach of the shorter ones: no two elements overlap."""
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=False)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


@fuzz(max_examples=CASES // 4)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    strides=st.lists(st.permutations((1, 3, 7, 20)), min_size=2, max_size=2),
    places=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    same_strides=st.booleans(),
    gate=st.sampled_from(tuple(GATES)),
)
def test_sequences_in_one_buffer_give_what_copies_give_or_an_error(
    shape, strides, places, same_strides, gate
):
    """However the sequences overlap, no result depends on the order of the writes."""
    case = Case(shape[0], shape[1], shape[2], 0, shape[1], gate=gate)
    _, _, *gates, _ = case.inputs()
    op = gp.prompt_gate_linear_ if case.is_linear else gp.prompt_gate_
    strides = [strides[0], strides[0] if same_strides else strides[1]]

    def views(buffer):
        return [buffer.as_strided(shape, s[:3], p) for s, p in zip(strides, places, strict=True)]

    buffer = torch.linspace(-2, 2, 300)
    h, x = views(buffer)
    written, read = (t.flatten().tolist() for t in views(torch.arange(300)))
    repeats = len(set(written)) < len(written)
    conflicts = written != read and not set(written).isdisjoint(read)
    before, wanted = buffer.clone(), h.clone()
    op(wanted, x.clone(), *gates, 0, shape[1])
    refusal = None
    try:
        op(h, x, *gates, 0, shape[1])
    except RuntimeError as error:
        refusal = str(error)
    if refusal is not None:
        assert "overlap" in refusal
        assert same_bits(buffer, before), "raised, but the buffer was written"
        apart = max(written) < min(read) or max(read) < min(written)
        assert repeats or not apart or not nests(shape, strides[0]), "raised without an overlap"
        return
    assert not repeats
    assert not conflicts
    assert same_bits(h, wanted)
    untouched = torch.ones(300, dtype=torch.bool)
    untouched[written] = False
    assert same_bits(buffer[untouched], before[untouched])


# ---- the fuzzer finds planted faults ----

RAW = torch.ops.gated_prompt
FWD, TOKEN_FWD, BWD = RAW.prompt_gate_fwd_, RAW.prompt_gate_linear_token_fwd_, RAW.prompt_gate_bwd_


def start_is_off_by_one(h, x, logit, start, length, *flags):
    return FWD(h, x, logit, start - (start > 0), length, *flags)


def term_of_block_in_is_dropped(h, x, *rest):
    return FWD(h, torch.zeros_like(x), *rest)


def weights_are_swapped(h, x, logit, *rest):
    return FWD(h, x, -logit, *rest)


def rules_are_swapped(h, x, logit, start, length, mix, save):
    return FWD(h, x, logit, start, length, not mix, save)


def stride_of_block_in_is_ignored(h, x, *rest):
    wrong = torch.empty_like(x, memory_format=torch.contiguous_format).stride()
    reach = sum((n - 1) * s for n, s in zip(x.shape, wrong, strict=True) if x.numel())
    if (x.storage_offset() + reach + 1) * x.itemsize <= x.untyped_storage().nbytes():
        x = x.as_strided(x.shape, wrong)
    return FWD(h, x, *rest)


def storage_offset_of_the_gate_is_ignored(h, x, logit, *rest):
    if logit.numel():
        logit = logit.as_strided(logit.shape, logit.stride(), 0)
    return FWD(h, x, logit, *rest)


def result_is_rounded_twice(h, x, logit, start, length, *flags):
    saved = FWD(h, x, logit, start, length, *flags)
    rows = h[:, start : start + length]
    rows.copy_(rows.bfloat16())
    return saved


def saved_is_taken_after_the_update(h, x, logit, start, length, mix, save):
    saved = FWD(h, x, logit, start, length, mix, save)
    rows = h[:, start : start + length]
    return saved.copy_((rows - x) / 2 if mix else rows) if save else saved


def row_after_the_slice_is_written(h, x, logit, start, length, *flags):
    saved = FWD(h, x, logit, start, length, *flags)
    h[:, start + length : start + length + 1] += 1
    return saved


def element_before_the_tensor_is_written(h, x, *rest):
    if h.storage_offset():
        h.as_strided((1,), (1,), h.storage_offset() - 1).fill_(1)
    return FWD(h, x, *rest)


def bias_of_one_channel_is_dropped(h, x, weight, bias, *rest):
    return TOKEN_FWD(h, x, weight, None, *rest)


def weight_has_one_channel_less(h, x, weight, *rest):
    weight = weight.clone()
    weight[-1:] = 0
    return TOKEN_FWD(h, x, weight, *rest)


def reduction_misses_the_last_sample(grad, saved, *rest):
    results = BWD(grad, saved, *rest)
    if len(saved) < 2:
        return results
    saved = saved.clone()
    saved[-1] = 0
    return results[0], BWD(grad.clone(), saved, *rest)[1], results[2]


def gradient_of_the_logit_lacks_its_factor(*args):
    grad_in, grad_logit, grad_bias = BWD(*args)
    return grad_in, grad_logit / 2 if args[6] else grad_logit, grad_bias


def gradient_of_block_out_is_not_rescaled(grad, *rest):
    return BWD(grad.clone(), *rest)


def gradient_of_the_carrier_is_dropped(grad, saved, logit, carrier, *rest):
    return BWD(grad, saved, logit, None, *rest)


def gradient_of_a_bias_sees_the_first_row_only(*args):
    grad_in, grad_logit, grad_bias = BWD(*args)
    if grad_bias.numel() and grad_logit.numel():
        grad_bias = grad_logit[:1, :1].sum((0, 1)).to(grad_bias.dtype)
    return grad_in, grad_logit, grad_bias


FAULTS = {
    "prompt_gate_fwd_": (
        start_is_off_by_one,
        term_of_block_in_is_dropped,
        weights_are_swapped,
        rules_are_swapped,
        stride_of_block_in_is_ignored,
        storage_offset_of_the_gate_is_ignored,
        result_is_rounded_twice,
        saved_is_taken_after_the_update,
        row_after_the_slice_is_written,
        element_before_the_tensor_is_written,
    ),
    "prompt_gate_linear_token_fwd_": (
        bias_of_one_channel_is_dropped,
        weight_has_one_channel_less,
    ),
    "prompt_gate_bwd_": (
        reduction_misses_the_last_sample,
        gradient_of_the_logit_lacks_its_factor,
        gradient_of_block_out_is_not_rescaled,
        gradient_of_the_carrier_is_dropped,
        gradient_of_a_bias_sees_the_first_row_only,
    ),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, id=fault.__name__)
        for name, faults in FAULTS.items()
        for fault in faults
    ],
)
def test_fuzzer_finds_a_planted_fault(name, fault, monkeypatch):
    monkeypatch.setattr(autograd, name, fault)

    # without shrinking the failing case
    @fuzz(max_examples=CASES, phases=[Phase.generate])
    @given(cases())
    def find(case):
        check_against_reference(case)

    with pytest.raises(AssertionError):
        find()
