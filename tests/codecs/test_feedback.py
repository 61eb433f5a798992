"""Error feedback loses nothing; with momentum it is Deep Gradient Compression."""

import math

import numpy as np
import pytest
import torch
from cases import CASES, OPTIONS, codec_of, options_of, subject, values
from reference import Gathered, LowRank, largest, signs

from shoal.codecs import build, make
from shoal.codecs.base import Codec
from shoal.codecs.feedback import ErrorFeedback
from shoal.codecs.momentum import MomentumCorrection
from shoal.codecs.powersgd import PowerSGD
from shoal.codecs.sparse import Density, TopK

STEPS = 20


def sent_by(codec: Codec, steps: int = STEPS, numel: int = 354) -> list[torch.Tensor]:
    return [codec.decode(codec.encode(values(numel, step)), numel) for step in range(steps)]


@pytest.mark.parametrize("codec", [name for name in OPTIONS if name != "none"])
def test_what_was_sent_and_the_residual_are_what_was_given(codec: str) -> None:
    fed_back = ErrorFeedback(codec_of(options_of(codec), 354))
    sent = sent_by(fed_back)
    given = torch.stack([values(354, step) for step in range(STEPS)]).sum(0)
    assert fed_back.residual is not None
    assert fed_back.residual.abs().max() > 1e-9
    torch.testing.assert_close(torch.stack(sent).sum(0) + fed_back.residual, given, rtol=0, atol=1e-12)


def test_what_waits_fades_by_the_decay() -> None:
    """SparseLoCo's rule of the error: e = 0.95 e + x; e = e - what is sent of it."""
    codec, waits = build(CASES["topk, SparseLoCo"], subject()), torch.zeros(354, dtype=torch.float64)
    for step, sent in enumerate(sent_by(codec)):
        waits = 0.95 * waits + values(354, step) - sent
    assert isinstance(codec, ErrorFeedback)
    torch.testing.assert_close(codec.residual, waits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
def test_the_largest_of_each_chunk_are_sent(density: float) -> None:
    tensor = values(354, 3)
    codec = make(options_of("topk", density=density, topk_chunk=64), subject())
    sent = codec.decode(codec.encode(tensor), 354)
    for start in range(0, 354, 64):
        part = tensor[start : start + 64]
        count = max(1, round(density * len(part)))
        expected = torch.from_numpy(largest(count)(part.numpy()))
        assert torch.equal(sent[start : start + 64], expected)


def test_feedback_is_where_the_codec_is_biased_or_where_it_is_asked_for() -> None:
    fed = {case for case, options in CASES.items() if isinstance(build(options, subject()), ErrorFeedback)}
    refused = {"none", "bf16", "fp16", "int8, stochastic", "sign, vote", "randomk, unbiased"}
    assert fed == CASES.keys() - refused
    assert not isinstance(build(options_of("topk", error_feedback=False), subject()), ErrorFeedback)


@pytest.mark.parametrize("codec", [name for name in OPTIONS if name != "none"])
def test_a_number_that_is_not_finite_is_sent_once_and_forgotten(codec: str) -> None:
    fed_back = ErrorFeedback(codec_of(options_of(codec), 354))
    sent_by(fed_back, 3)
    for poison in (math.nan, math.inf):
        tensor = values(354, 1)
        tensor[::50] = poison
        assert not torch.isfinite(fed_back.decode(fed_back.encode(tensor), 354)).all()
        assert all(torch.isfinite(each).all() for each in sent_by(fed_back, 3))


def test_momentum_is_forgotten_likewise() -> None:
    codec = build(CASES["topk, DGC"], subject())
    sent_by(codec, 3)
    assert not torch.isfinite(codec.decode(codec.encode(torch.full((354,), math.nan).double()), 354)).all()
    assert all(torch.isfinite(each).all() for each in sent_by(codec, 3))


def sgd(momentum: float) -> list[torch.Tensor]:
    """What torch's own SGD adds to a parameter at rate -1."""
    parameter = torch.nn.Parameter(torch.zeros(354, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum)
    steps = []
    for step in range(STEPS):
        before = parameter.detach().clone()
        parameter.grad = values(354, step)
        optimizer.step()
        steps.append(before - parameter.detach())
    return steps


@pytest.mark.parametrize(("masking", "equals"), [(False, 0.9), (True, 0.0)])
def test_dgc_that_sends_all_is_sgd(masking: bool, equals: float) -> None:
    """With momentum, if velocities stay; without, if what was sent starts anew."""
    codec = MomentumCorrection(TopK(subject(), Density(1.0)), 0.9, masking=masking)
    for found, expected in zip(sent_by(codec), sgd(equals), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masking", [False, True])
def test_dgc_follows_its_rule(masking: bool) -> None:
    codec = MomentumCorrection(TopK(subject(), Density(0.1)), 0.9, masking=masking)
    rule = Gathered(largest(35), momentum=0.9, masking=masking)
    for step, found in enumerate(sent_by(codec)):
        expected = rule.sum([values(354, step).numpy()])
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_sign_with_feedback_follows_its_rule() -> None:
    rule = Gathered(signs(16))
    for step, found in enumerate(sent_by(build(options_of("sign"), subject()))):
        np.testing.assert_allclose(found.numpy(), rule.sum([values(354, step).numpy()]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(9, 6), (6, 9), (5, 5)])
def test_full_rank_powersgd_is_exact(rows: int, columns: int) -> None:
    whole = subject().__class__((torch.Size((rows, columns)), torch.Size((3,))), torch.float64)
    codec = ErrorFeedback(PowerSGD(whole, min(rows, columns), saving=0.0))
    assert isinstance(codec.codec, PowerSGD)
    assert codec.codec.matrices
    for step, found in enumerate(sent_by(codec, 5, whole.numel)):
        torch.testing.assert_close(found, values(whole.numel, step), rtol=0, atol=1e-13)


def test_powersgd_follows_its_rule() -> None:
    whole = subject().__class__((torch.Size((20, 12)),), torch.float64)
    codec = make(options_of("powersgd"), whole)
    assert isinstance(codec, PowerSGD)
    fed_back, rule = ErrorFeedback(codec), None
    for step in range(STEPS):
        tensor = values(240, step)
        found = fed_back.decode(fed_back.encode(tensor), 240)
        if rule is not None:
            expected = rule.sum([tensor.view(20, 12).numpy()])
            np.testing.assert_allclose(found.view(20, 12).numpy(), expected, rtol=0, atol=1e-12)
        else:
            assert fed_back.residual is not None
            assert codec.factors is not None
            rule = LowRank(codec.factors.view(12, 2).numpy().copy())
            rule.residuals[0] = fed_back.residual.view(20, 12).numpy().copy()


def test_powersgd_finds_its_way_back_from_zero() -> None:
    """A parameter that got no gradient for a while must not be lost: Q was zero then."""
    whole = subject().__class__((torch.Size((40, 30)),), torch.float64)
    codec = ErrorFeedback(make(options_of("powersgd"), whole))
    low = torch.zeros(40, 30, dtype=torch.float64)
    low[20:, 20:] = torch.outer(values(20, 1), values(10, 2))
    for _ in range(2):
        codec.encode(torch.zeros(1200, dtype=torch.float64))
    found = codec.decode(codec.encode(low.view(-1)), 1200)
    torch.testing.assert_close(found, low.view(-1), rtol=0, atol=1e-12)
