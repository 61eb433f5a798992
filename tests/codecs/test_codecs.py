"""What every codec must do, alone in one process; and each against its rule, written once more in NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, OPTIONS, SHAPES, SIZES, codec_of, options_of, subject, values
from reference import largest, nearest, signs

from shoal.codecs import build, check, make
from shoal.codecs.base import ChunkCodec
from shoal.codecs.sparse import Density
from shoal.errors import UserError

every_case = pytest.mark.parametrize("case", CASES)
every_codec = pytest.mark.parametrize("codec", OPTIONS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
MARK = {"topk": 0.1, "randomk": 0.1}


@both_dtypes
@every_case
def test_a_payload_has_the_predicted_length_and_any_codec_reads_it(case: str, dtype: torch.dtype) -> None:
    for numel in SIZES:
        sender, receiver = codec_of(CASES[case], numel, dtype), codec_of(CASES[case], numel, dtype, rank=1)
        for step in range(5):
            tensor = values(numel, step, dtype=dtype)
            before, predicted = tensor.clone(), sender.nbytes(numel)
            payload = sender.encode(tensor)
            assert (payload.dtype, payload.shape) == (torch.uint8, (predicted,))
            assert torch.equal(tensor, before), "what is given is not changed"
            decoded = receiver.decode(payload, numel)
            assert (decoded.dtype, decoded.shape) == (dtype, (numel,))
            assert torch.equal(decoded, sender.decode(payload, numel))
            tensor.fill_(math.nan)
            assert torch.equal(decoded, sender.decode(payload, numel)), "a payload is memory of its own"


@every_codec
def test_rows_are_encoded_each_for_itself(codec: str) -> None:
    for numel in SIZES:
        one = codec_of(options_of(codec), numel)
        if not isinstance(one, ChunkCodec):
            return
        rows = values(3 * numel, 4).view(3, numel)
        payloads = one.encode(rows)
        assert torch.equal(payloads, torch.stack([one.encode(row) for row in rows]))
        alone = [one.decode(payload, numel) for payload in payloads]
        assert torch.equal(one.decode(payloads, numel), torch.stack(alone))


def decoded(case: str, tensor: torch.Tensor) -> torch.Tensor:
    codec = codec_of(CASES[case], tensor.numel(), tensor.dtype)
    return codec.decode(codec.encode(tensor), tensor.numel())


@both_dtypes
@every_case
def test_zero_is_zero(case: str, dtype: torch.dtype) -> None:
    for numel in SIZES:
        assert not decoded(case, torch.zeros(numel, dtype=dtype)).any()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-10, 1e4, 1e30, 1e37])
@every_case
def test_tiny_and_huge_numbers_stay_within_their_size(case: str, scale: float) -> None:
    """Nothing small becomes large or NaN; what fp16 cannot hold becomes infinite, never another number."""
    tensor = values(354, 5, dtype=torch.float32, scale=scale)
    found = decoded(case, tensor)
    if CASES[case].codec == "fp16" and scale > 65504:
        assert torch.isinf(found).any()
        return
    assert torch.isfinite(found).all()
    room = 10 if "unbiased" in case else 1  # n / k
    norm = 354**0.5 if CASES[case].codec == "powersgd" else 1
    assert found.abs().max() <= room * norm * tensor.abs().max() * 1.01


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@both_dtypes
@every_case
def test_what_is_not_finite_is_seen(case: str, dtype: torch.dtype, poison: float) -> None:
    for place in (0, 100, 239, 240, 353):
        tensor = values(354, 6, dtype=dtype)
        tensor[place] = poison
        assert not torch.isfinite(decoded(case, tensor)).all()


@pytest.mark.parametrize("numel", SIZES)
def test_quantizers_follow_their_rule(numel: int) -> None:
    tensor = values(numel, 7)
    for codec, levels in (("int8", 127), ("int4", 7)):
        found = decoded(codec, tensor).numpy()
        np.testing.assert_allclose(found, nearest(levels, 16)(tensor.numpy()), rtol=1e-12)
        worst = np.abs(tensor.numpy()).max() / levels / 2
        assert np.abs(found - tensor.numpy()).max() <= worst * (1 + 1e-6)


@pytest.mark.parametrize("numel", SIZES)
def test_sign_and_topk_follow_their_rules(numel: int) -> None:
    tensor = values(numel, 8)
    np.testing.assert_allclose(decoded("sign", tensor).numpy(), signs(16)(tensor.numpy()), rtol=1e-12)
    count = max(1, round(0.1 * numel))
    np.testing.assert_array_equal(decoded("topk", tensor).numpy(), largest(count)(tensor.numpy()))
    assert torch.equal(decoded("topk, all", tensor), tensor)


def test_casts_round_to_the_nearest() -> None:
    tensor = values(354, 9, dtype=torch.float32)
    for codec, digits in (("bf16", 8), ("fp16", 11)):
        assert ((decoded(codec, tensor) - tensor).abs() <= tensor.abs() * 2.0**-digits + 2**-25).all()
        assert not torch.equal(decoded(codec, tensor), tensor)
    assert torch.equal(decoded("none", tensor), tensor)


@pytest.mark.parametrize(
    ("case", "more"),
    [("int8, stochastic", {}), ("int8, stochastic", {"codec": "int4"}), ("randomk, unbiased", {})],
)
def test_unbiased_codecs_are_right_on_average(case: str, more: dict[str, Any]) -> None:
    """Within five standard errors everywhere, but for scales in float32; the nearest rounding is not."""
    trials, tensor = 2000, values(64, 10)
    slack = 1e-7 * tensor.abs().max()
    codec = make(CASES[case].model_copy(update=more), subject(64))
    assert not codec.biased
    drawn = torch.stack([codec.decode(codec.encode(tensor), 64) for _ in range(trials)])
    errors = (drawn.mean(0) - tensor).abs()
    assert (errors <= 5 * drawn.std(0) / trials**0.5 + slack).all()
    assert drawn.std(0).max() > 0
    if CASES[case].stochastic:
        rounded = make(options_of(more.get("codec", "int8")), subject(64))
        once = rounded.decode(rounded.encode(tensor), 64)
        assert ((once - tensor).abs() > 5 * drawn.std(0) / trials**0.5 + slack).any()


def test_ranks_round_with_noise_of_their_own_and_draw_the_same_places() -> None:
    tensor = values(354, 11)
    for case, same in (("int8, stochastic", False), ("randomk", True)):
        payloads = [codec_of(CASES[case], 354, rank=rank).encode(tensor) for rank in (0, 1)]
        assert torch.equal(*payloads) is same
    codec = codec_of(CASES["randomk"], 354)
    places = [codec.decode(codec.encode(tensor), 354).nonzero().flatten().tolist() for _ in range(40)]
    assert all(len(each) == 35 for each in places)
    assert len({place for each in places for place in each}) > 340, "in time every place is drawn"


@every_case
def test_what_is_remembered_can_be_given_to_another(case: str) -> None:
    one, other = build(CASES[case], subject()), build(CASES[case], subject())
    for step in range(3):
        one.encode(values(354, step))
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    for step in range(3, 6):
        assert torch.equal(one.encode(values(354, step)), other.encode(values(354, step)))


@both_dtypes
@every_case
def test_what_is_held_is_what_was_predicted(case: str, dtype: torch.dtype) -> None:
    codec = build(CASES[case], subject(dtype=dtype))
    codec.encode(values(354, 12, dtype=dtype))
    assert codec.held(354) == sum(t.nbytes for t in codec.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize(("final", "warmup"), [(0.001, 4), (0.01, 0), (0.25, 10)])
def test_the_density_falls_to_its_value(final: float, warmup: int) -> None:
    counts = [Density(final, warmup).count(10**6, call) for call in range(warmup + 3)]
    assert counts == sorted(counts, reverse=True)
    assert counts[warmup:] == [round(final * 10**6)] * 3
    assert warmup == 0 or counts[warmup - 1] > counts[warmup]
    if final == 0.001:  # DGC: 75, 93.75, 98.4, 99.6, 99.9 % are left out
        assert [round(100 - count / 1e4, 1) for count in counts[:5]] == [74.9, 93.7, 98.4, 99.6, 99.9]


def test_powersgd_factors_only_what_shrinks() -> None:
    shapes = tuple(map(torch.Size, [(20, 12), (7,), (3, 5, 6), (), (4, 4), (0, 9), (9, 64)]))
    codec = make(options_of("powersgd"), subject().__class__(shapes))
    assert [(part.rows, part.columns, part.rank) for part in codec.matrices] == [(20, 12, 2), (9, 64, 2)]
    assert sum(part.stop - part.start for part in codec.raw) == 7 + 90 + 1 + 16


def test_what_makes_no_sense_is_refused() -> None:
    shapes = list(map(torch.Size, SHAPES))
    check(options_of("powersgd"), shapes)
    with pytest.raises(UserError, match="--rank 13: the largest matrix of the model has rank 12"):
        check(options_of("powersgd", rank=13), shapes)
    with pytest.raises(UserError, match="no matrix of the model would shrink"):
        check(options_of("powersgd", rank=12), shapes)
    with pytest.raises(UserError, match="leave one of the two out"):
        check(options_of("topk", codec_momentum=0.9, error_feedback=False), shapes)
    check(options_of("topk", error_decay=0.95), shapes)
    for refused in (
        options_of("bf16", error_decay=0.95),
        options_of("topk", error_decay=0.95, error_feedback=False),
    ):
        with pytest.raises(UserError, match=r"--error-decay 0\.95: there is no plain error feedback"):
            check(refused, shapes)
    with pytest.raises(UserError, match="none of that name; take one of: none, bf16"):
        make(options_of("none").model_copy(update={"codec": "zip"}), subject())
