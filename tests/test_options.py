"""Options that no strategy or codec reads, or that contradict another, are refused before anything is launched."""

from pathlib import Path

import pytest

from shoal.config import check_options, dump_yaml, load_config, resolve_grid
from shoal.errors import UserError

ONEBIT = "--optim onebit-adam --codec sign --codec-momentum 0.9 --codec-warmup 100 --max-grad-norm 0"
REFUSED = {
    "--density 0.1": "--density: strategy allreduce with codec none does not read it",
    "--codec int8 --density 0.1": "--density: strategy allreduce with codec int8 does not read it",
    "--sync-every 4": "--sync-every: strategy allreduce",
    "--strategy local --topology ring": "--topology: strategy local",
    "--strategy demo --codec int8": "--codec: strategy demo",
    "--strategy demo --optim muon": "--optim muon: demo is the optimizer itself",
    "--exact --codec int8": "--exact: strategy allreduce with codec int8",
    "--exact --strategy local": "--exact: strategy local",
    "--exact --clip-each 1": "--exact: each worker's own gradient",
    "--strategy local --group-size 2": "only one of it and --global-every",
    "--strategy local --group-size 2 --global-every 8 --codec int8": "groups average plainly",
    "--strategy local --outer-lr 0.5": "--outer-lr: the plain mean of the replicas reads none",
    "--strategy local --averaging elastic --outer-momentum 0.5": "--outer-momentum: elastic averaging reads none",
    "--strategy diloco --sync-every 4 --fragments 5": "--fragments 5: there are only 4 steps",
    "--strategy diloco --fragments 31": "--fragments 31: there are only 30 steps",
    "--strategy diloco --overlap-steps 30": "--overlap-steps 30: the next sync starts after 30 steps",
    "--strategy diloco --sync-every 1ktokens --fragments 2": "timed in steps",
    "--strategy demo --offload optimizer": "--offload optimizer: with demo a worker keeps no state",
    "--strategy local --guard-steps 5": "there is no guard",
    "--strategy local --guard-drift 0.5": "there is no guard",
    "--strategy local --normalize each": "--normalize each: with local",
    "--error-feedback": "--error-feedback: nothing is encoded",
    "--strategy gossip --codec topk --error-feedback": "--error-feedback: gossip encodes differences",
    "--error-decay 0.95": "--error-decay: nothing is encoded",
    "--strategy gossip --codec topk --error-decay 0.95": "--error-decay: gossip encodes differences",
    "--strategy gossip --codec topk --codec-warmup 3": "--codec-warmup: gossip encodes differences",
    "--strategy async --codec topk --codec-warmup 3": "--codec-warmup 3: strategy async sends from one rank",
    "--codec topk --codec-momentum 0.9": "--codec-momentum: adamw would take its momentum a second time",
    "--strategy diloco --codec topk --codec-momentum 0.9 --optim sgd": "ways of many steps",
    "--strategy server --codec sign --codec-momentum 0.9 --optim sgd": "the momentum of sign is that of all ranks",
    "--optim onebit-adam": "add --codec sign --codec-momentum 0.9 --codec-warmup 100 --max-grad-norm 0",
    f"{ONEBIT} --normalize sum": "add --normalize no",
    "--strategy async --delayed-momentum 2": "add --optim sgd",
    "--strategy server --trim 0.1": "add --aggregation trimmed-mean",
    "--precision bf16-true --optim sgd": "sgd would round small updates of bf16 parameters away",
    "--precision bf16-true --strategy diloco": "take --strategy allreduce, zero1, zero2 or zero3",
    "--quantize int8": "give it to shoal evaluate",
}
TAKEN = [
    "",
    ONEBIT,
    "--codec topk --codec-momentum 0.9 --optim sgd --codec-warmup 20 --clip-each 1",
    "--strategy local --averaging slowmo --outer-lr 1 --outer-momentum 0.5 --sync-every 100ktokens",
    "--strategy diloco --fragments 4 --overlap-steps 2 --mixing 0.5 --codec int4 --guard 0.05 --guard-drift 0.1",
    "--strategy noloco --outer-lr 0.5 --local-after 10",
    "--strategy server --quorum 2 --servers 2 --codec int8 --no-error-feedback",
    "--strategy async --max-staleness 3 --collect 2 --delay-compensation 0.04",
    "--strategy gossip --topology push-sum --overlap-steps 0 --codec sign --mixing 0.2",
    "--strategy demo --demo-topk 4",
    "--strategy diloco --outer-lr 1 --outer-momentum 0 --codec topk --two-bits --topk-chunk 4096 --density 0.02"
    " --error-decay 0.95",
    "--precision bf16-true --strategy zero3",
    "--precision bf16-true --codec int8",
    "--fp16 --strategy diloco --codec int4",
]


def words_of(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("words", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(UserError) as refused:
        check_options(load_config(None, words_of(words)))
    assert REFUSED[words] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", TAKEN)
def test_what_makes_sense_is_taken(words: str) -> None:
    check_options(load_config(None, words_of(words)))


@pytest.mark.parametrize(
    ("words", "workers", "grid"),
    [
        ("", 4, (4, 1, 1, 1, 1)),
        ("--strategy zero3", 4, (1, 4, 1, 1, 1)),
        ("--strategy fsdp --dp-replicate 2", 4, (2, 2, 1, 1, 1)),
        ("--dp-replicate 2", 4, (2, 2, 1, 1, 1)),
        ("--dp-replicate 4 --exact", 4, (4, 1, 1, 1, 1)),
        ("--dp-shard 3", 6, (2, 3, 1, 1, 1)),
        ("--strategy zero1 --dp-shard 1 --exact", 2, (2, 1, 1, 1, 1)),
        ("--strategy zero3 --exact --compile", 1, (1, 1, 1, 1, 1)),
        ("--tp 2", 4, (2, 1, 1, 1, 2)),
        ("--tp 2 --cp 2 --dp-replicate 2 --zero-stage 1", 16, (2, 2, 1, 2, 2)),
        ("--pp 2 --dp-replicate 2", 8, (2, 2, 2, 1, 1)),
        ("--cp 2 --zero-stage 1", 8, (1, 4, 1, 2, 1)),
    ],
)
def test_what_is_not_given_of_the_grid_follows(words: str, workers: int, grid: tuple[int, ...]) -> None:
    config = load_config(None, words_of(words), {}).config
    assert tuple(resolve_grid(config, workers).values()) == grid


@pytest.mark.parametrize(
    ("words", "workers", "found"),
    [
        ("--dp-shard 3", 4, "--dp-shard 3: 4 workers do not divide by 3; take one of 1, 2, 4"),
        ("--dp-replicate 3", 4, "--dp-replicate 3: 4 workers do not divide by 3"),
        ("--dp-shard 2 --dp-replicate 3", 4, "3 replicas x 2 each = 6, and there are 4 workers"),
        ("--tp 2 --pp 2", 6, "--pp 2 --tp 2: 6 workers do not divide by 4"),
        ("--dp-shard 2 --dp-replicate 3 --cp 2", 8, "= 6, and there are 4 teams of 2 workers"),
        (
            "--tp 2 --pp 2 --pp-schedule zbv-zero-bubble",
            4,
            "--pp-schedule zbv-zero-bubble: it splits backward passes",
        ),
        ("--tp 2 --exact", 2, "--exact: 2 workers hold a replica together"),
        ("--strategy zero3 --exact", 2, "--exact: 2 workers hold a replica together"),
        ("--dp-shard 2 --compile", 4, "--compile: 2 workers hold a replica together"),
        ("--zero-stage 1 --optim muon", 3, "--optim muon: 3 workers hold a replica together"),
        ("--offload parameters", 2, "--offload parameters: parameters are brought to the GPU block by block"),
        ("--offload parameters --strategy zero2", 2, "--offload parameters: parameters are brought"),
        ("--pp-schedule gpipe", 2, "--pp-schedule gpipe: there is no pipeline"),
        ("--pp 2 --pp-virtual-stages 2", 2, "--pp-virtual-stages 2: 1f1b has one stage on each worker"),
        (
            "--pp 2 --pp-schedule dualpipev --pp-virtual-stages 3",
            2,
            "dualpipev has two stages on each worker",
        ),
        ("--pp 2 --pp-schedule looped-bfs --pp-virtual-stages 1", 2, "looped-bfs has several stages"),
        (
            "--pp 2 --pp-schedule Interleaved1F1B --dp-shard 2",
            4,
            "--pp-schedule interleaved-1f1b: 2 stages on",
        ),
        ("--strategy server --quorum 2 --dp-shard 2", 4, "--quorum 2: 2 workers hold a replica together"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(words: str, workers: int, found: str) -> None:
    config = load_config(None, words_of(words), {}).config
    with pytest.raises(UserError) as caught:
        resolve_grid(config, workers)
    assert found in str(caught.value)


def test_the_name_of_a_stage_wins_over_what_a_recipe_says(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(load_config(None, ["--strategy", "zero3"], {})))
    resolved = load_config(recipe, ["--strategy", "zero1"], {})
    assert (resolved.config.strategy.name, resolved.config.layout.zero_stage) == ("allreduce", 1)
    assert resolved.origins["layout.zero_stage"] == "flag --strategy"
    assert load_config(recipe, [], {}).config.layout.zero_stage == 3
