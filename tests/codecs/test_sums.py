"""Sums over real ranks: the same bits for all, the bytes that were predicted, and nothing lost."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, OPTIONS, SIZES, options_of, subject, values
from laws.pool import Pool
from reference import Gathered, TwoStages, largest, nearest, signs, two_bits
from sums import NUMEL, Summed, gradient, many, shapes_of, sum_steps, waiting

from shoal.codecs import build
from shoal.codecs.channel import Channel
from shoal.codecs.sums import EncodedSums, refit
from shoal.cost import Sizes
from shoal.wire.mesh import Mesh

STEPS = range(12)
FED_BACK = [  # and nothing of it fades away
    case
    for case, options in CASES.items()
    if "residual" in str(build(options, subject()).__dict__) and options.error_decay == 1
]
worlds = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


def exact(ranks: int, step: int, numel: int = NUMEL) -> torch.Tensor:
    return torch.stack([gradient(rank, step, numel) for rank in range(ranks)]).sum(0)


@pytest.fixture(scope="module")
def summed(pool: Pool) -> Any:
    """The cases, each summed for some steps in one world of so many ranks: by case and rank."""

    @cache
    def of(ranks: int, dtype: torch.dtype = torch.float64) -> dict[str, list[Summed]]:
        steps = STEPS if dtype == torch.float64 else STEPS[:4]
        cases = [((options, steps), {"dtype": dtype}) for options in CASES.values()]
        found = pool.world(ranks, many, cases)
        return {case: [on_rank[i] for on_rank in found] for i, case in enumerate(CASES)}

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@worlds
def test_all_ranks_end_in_the_same_bits(summed: Any, ranks: int, dtype: torch.dtype) -> None:
    for case, on_ranks in summed(ranks, dtype).items():
        for step, sums in enumerate(zip(*(found.sums for found in on_ranks), strict=True)):
            assert sums[0].dtype == dtype
            assert all(torch.equal(sums[0], each) for each in sums), f"{case}, step {step}"
            assert torch.isfinite(sums[0]).all()


@worlds
def test_the_bytes_are_those_predicted(summed: Any, ranks: int) -> None:
    sizes = Sizes(tuple(shapes_of(NUMEL)), ranks, itemsize=8)
    for case, on_ranks in summed(ranks).items():
        dense = EncodedSums.bytes_sent(options_of("none"), sizes)
        for found in on_ranks:
            for step in STEPS[CASES[case].codec_warmup :]:
                padding = found.sent[step] - dense if CASES[case].codec == "none" else 0
                assert found.sent[step] - padding == EncodedSums.bytes_sent(CASES[case], sizes), case
                assert 0 <= padding <= 2 * 2 * 8
        channel = Channel(CASES[case], subject(), ranks)
        held = sum(t.nbytes for t in found.state.values() if t.is_floating_point())
        assert held == EncodedSums.bytes_held(CASES[case], sizes) == channel.held(), case


@worlds
def test_what_was_summed_and_the_residuals_are_what_was_given(summed: Any, ranks: int) -> None:
    """Whatever a codec leaves out, on either side, is sent later: no gradient is lost or counted twice."""
    given = torch.stack([exact(ranks, step) for step in STEPS]).sum(0)
    for case in FED_BACK:
        if CASES[case].codec_momentum:
            continue
        on_ranks = summed(ranks)[case]
        total = torch.stack(on_ranks[0].sums).sum(0) + waiting([found.state for found in on_ranks])
        assert torch.allclose(total, given, rtol=0, atol=1e-12), case


RULES = {
    "int8": lambda: TwoStages(nearest(127, 16), True),
    "int4": lambda: TwoStages(nearest(7, 16), True),
    "sign": lambda: TwoStages(signs(16), True),
    "topk": lambda: Gathered(largest(35)),
    "topk, 2 bits": lambda: Gathered(two_bits(35)),
    "int4, one block": lambda: TwoStages(nearest(7, 512), True),
}


@pytest.mark.parametrize("case", RULES)
@worlds
def test_a_sum_follows_the_published_rule(summed: Any, ranks: int, case: str) -> None:
    rule = RULES[case]()
    for step in STEPS:
        expected = rule.sum([gradient(rank, step).numpy() for rank in range(ranks)])
        found = summed(ranks)[case][0].sums[step].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10, err_msg=f"step {step}")


@worlds
def test_what_is_linear_or_cast_is_close_to_the_sum(summed: Any, ranks: int) -> None:
    for step in STEPS:
        total = exact(ranks, step)
        for case, error in (("none", 1e-14), ("fp16", 2e-3), ("bf16", 1.6e-2), ("topk, all", 1e-12)):
            found = summed(ranks)[case][0].sums[step]
            torch.testing.assert_close(found, total, rtol=0, atol=error * total.abs().max().item() * ranks)


@worlds
def test_every_sum_draws_other_places(summed: Any, ranks: int) -> None:
    places = [set(each.nonzero().flatten().tolist()) for each in summed(ranks)["randomk"][0].sums]
    assert all(len(each) == 35 for each in places)
    assert len(set.union(*places)) > 35 * len(places) / 2


@worlds
def test_dgc_follows_its_rule_in_a_sum(summed: Any, ranks: int) -> None:
    counts = [round(0.1 ** min(1.0, (step + 1) / 4) * NUMEL) for step in STEPS]
    rule = Gathered(largest(0), momentum=0.9)
    for step in STEPS:
        rule.rule = largest(counts[step])
        expected = rule.sum([gradient(rank, step).numpy() for rank in range(ranks)])
        found = summed(ranks)["topk, DGC"][0].sums[step].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=f"step {step}")


@worlds
def test_a_majority_decides(summed: Any, ranks: int) -> None:
    """The sign that most ranks have; where votes stand even, that of the sum weighted by the scales."""
    chunk = -(-NUMEL // ranks)
    whole = (NUMEL // chunk * chunk // 16) * 16  # what fills up the last chunk counts in its last scale
    for step in STEPS[:5]:
        grads = [gradient(rank, step).numpy() for rank in range(ranks)]
        votes = np.sum([np.where(g >= 0, 1, -1) for g in grads], axis=0)
        decoded = [[signs(16)(g[at : at + chunk]) for at in range(0, NUMEL, chunk)] for g in grads]
        weighted = [np.concatenate(each) for each in decoded]
        winners = np.sign(np.where(votes == 0, np.sum(weighted, axis=0), votes))
        found = summed(ranks)["sign, vote"][0].sums[step].numpy()
        expected = winners * np.sum(np.abs(weighted), axis=0)
        np.testing.assert_array_equal(np.sign(found), winners)
        np.testing.assert_allclose(found[:whole], expected[:whole], rtol=1e-6)


@worlds
def test_before_the_warm_up_ends_sums_are_exact(summed: Any, ranks: int) -> None:
    for case in ("sign, momentum", "powersgd, late"):
        found = summed(ranks)[case][0].sums
        for step in STEPS[:4]:
            close = torch.allclose(found[step], exact(ranks, step), rtol=0, atol=1e-12)
            assert close == (step < CASES[case].codec_warmup), (case, step)


@worlds
def test_one_bit_adam_follows_its_rule(summed: Any, ranks: int) -> None:
    """In the warm-up the momentum follows the sums; then ranks encode theirs, and share what comes of it."""
    momentum, rule = np.zeros(NUMEL), TwoStages(signs(16), True)
    for step in STEPS:
        grads = [gradient(rank, step).numpy() for rank in range(ranks)]
        found = summed(ranks)["sign, momentum"][0].sums[step].numpy()
        if step < 2:
            momentum = 0.9 * momentum + 0.1 * np.sum(grads, axis=0)
        else:
            momentum = rule.sum([0.9 * momentum / ranks + 0.1 * g for g in grads])
            np.testing.assert_allclose(found, momentum, rtol=0, atol=1e-10, err_msg=f"step {step}")


@worlds
def test_sizes_that_divide_by_nothing(pool: Pool, ranks: int) -> None:
    """Less elements than ranks, a bit more than a block, several tensors under way at once."""
    numels = tuple(SIZES)
    cases = [((options, range(2)), {"numels": numels}) for options in CASES.values()]
    found = pool.world(ranks, many, cases)
    for i, (case, options) in enumerate(CASES.items()):
        predicted = [
            EncodedSums.bytes_sent(options, Sizes(tuple(shapes_of(n)), ranks, itemsize=8)) for n in numels
        ]
        for step in range(2):
            assert all(torch.equal(found[0][i].sums[step], each[i].sums[step]) for each in found), case
            if options.codec != "none" and step >= options.codec_warmup:
                assert all(each[i].sent[step] == sum(predicted) for each in found), case
        assert torch.isfinite(found[0][i].sums[-1]).all()


def test_what_is_not_finite_on_one_rank_is_seen_by_all_and_is_gone_a_step_later(pool: Pool) -> None:
    cases = [((options, range(6)), {"poisoned": 4}) for options in CASES.values()]
    found = pool.world(3, many, cases)
    for i, case in enumerate(CASES):
        for on_rank in found:
            finite = [bool(torch.isfinite(each).all()) for each in on_rank[i].sums]
            assert finite == [True] * 4 + [False, True], case


def test_interrupted_is_uninterrupted(pool: Pool, summed: Any) -> None:
    cases = [((options, range(7)), {}) for options in CASES.values()]
    before = pool.world(3, many, cases)
    cases = [
        (
            (options, STEPS[7:]),
            {"states": [{**on_rank[i].state, "other": torch.ones(1)} for on_rank in before]},
        )
        for i, options in enumerate(CASES.values())
    ]
    after = pool.world(3, many, cases)
    for i, case in enumerate(CASES):
        for whole, rest in zip(summed(3)[case], after, strict=True):
            assert all(map(torch.equal, whole.sums[7:], rest[i].sums)), case
            assert whole.state.keys() == rest[i].state.keys()
            assert all(torch.equal(whole.state[name], rest[i].state[name]) for name in whole.state), case


@worlds
def test_a_sum_that_was_rolled_back_leaves_no_trace(pool: Pool, summed: Any, ranks: int) -> None:
    """A step that is taken again must not feed an error back twice: sums and states are those of one sum."""
    steps = STEPS[:5]
    cases = [((options, steps), {}) for options in CASES.values()]
    once = pool.world(ranks, many, cases)
    again = pool.world(ranks, many, [(given, {"undone": True}) for given, _ in cases])
    for i, case in enumerate(CASES):
        for expected, found in zip(once, again, strict=True):
            assert all(map(torch.equal, expected[i].sums, found[i].sums)), case
            assert expected[i].state.keys() == found[i].state.keys()
            assert all(torch.equal(expected[i].state[name], t) for name, t in found[i].state.items()), case


@pytest.mark.parametrize(("ranks", "later"), [(3, 2), (2, 3), (4, 1), (1, 4)])
def test_nothing_is_lost_when_the_ranks_change(pool: Pool, summed: Any, ranks: int, later: int) -> None:
    """What waited on the ranks that were is sent by those that are."""
    cases = [case for case in FED_BACK if not CASES[case].codec_momentum]
    states = {case: [found.state for found in summed(ranks)[case]] for case in cases}
    given = [((CASES[case], STEPS), {"states": states[case]}) for case in cases]
    found = pool.world(later, many, given)
    for i, case in enumerate(cases):
        owed = waiting(states[case])
        assert owed.abs().max() > 1e-9 or case == "topk, all"
        refitted = [refit(states[case], rank, later) for rank in range(later)]
        torch.testing.assert_close(waiting(refitted), owed, rtol=0, atol=1e-13)
        total = torch.stack(found[0][i].sums).sum(0) + waiting([on_rank[i].state for on_rank in found])
        expected = owed + torch.stack([exact(later, step) for step in STEPS]).sum(0)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_a_state_that_was_not_used_yet_is_saved_again(pool: Pool, summed: Any) -> None:
    states = [found.state for found in summed(3)["topk"]]
    idle = pool.world(3, sum_steps, CASES["topk"], range(0), states=states)
    for found, state in zip(idle, states, strict=True):
        assert found.state.keys() == state.keys()
        assert all(torch.equal(found.state[name], state[name]) for name in state)


def hand_on(mesh: Mesh, cases: list[str]) -> list[Any]:
    """Each rank sends to the next one what it encoded; returns what came, what was given, and the bytes."""
    wire, found = mesh.wire("world"), []
    after, before = (mesh.rank + 1) % mesh.world_size, (mesh.rank - 1) % mesh.world_size
    for case in cases:
        exchange = EncodedSums(CASES[case], wire)
        for step in range(3):
            like = gradient(mesh.rank, step)
            undone = exchange.encode_for("a", like, shapes_of(NUMEL))
            exchange.rollback()
            payload = exchange.encode_for("a", like, shapes_of(NUMEL))
            exchange.commit()
            assert torch.equal(payload, undone), "what was rolled back leaves no trace"
            received = torch.empty(exchange.payload_bytes(like, shapes_of(NUMEL)), dtype=torch.uint8)
            sent = wire.bytes_sent
            for work in [wire.start_send(payload, after), wire.start_receive(received, before)]:
                work.wait()
            decoded = [exchange.decode("a", each, like, shapes_of(NUMEL)) for each in (payload, received)]
            found.append((payload.numel(), *decoded, wire.bytes_sent - sent))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_one_rank_encodes_another_decodes(pool: Pool, ranks: int) -> None:
    found = pool.world(ranks, hand_on, list(CASES))
    for i in range(3 * len(CASES)):
        for rank in range(ranks):
            nbytes, own, _, sent = found[rank - 1][i]
            assert torch.equal(found[rank][i][2], own)
            assert sent == nbytes


def test_codecs_shrink_what_is_sent() -> None:
    """On tensors of the size that one meets, the shares of float32 that the docstrings say; 4 ranks."""
    sizes = Sizes((torch.Size((1024, 1024)),), 4)
    dense = EncodedSums.bytes_sent(options_of("none"), sizes)
    shares = {"bf16": 1 / 2, "int8": 0.252, "int4": 0.127, "sign": 1 / 30, "topk": 0.04, "randomk": 0.01,
              "powersgd": 8 / 1024}  # fmt: skip
    assert OPTIONS.keys() == shares.keys() | {"none", "fp16"}
    for codec, share in shares.items():
        options = options_of(codec, block=None, density=None, rank=None)
        assert EncodedSums.bytes_sent(options, sizes) / dense == pytest.approx(share, rel=0.02), codec


def test_values_of_ranks_and_steps_differ() -> None:
    """The gradients of these tests are what they are taken for."""
    drawn = [gradient(rank, step) for rank in range(4) for step in STEPS]
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn)
    assert not torch.equal(values(9, 1), values(9, 2))
