"""One definition of the settings, read alike from file, environment, flags and Python."""

import json
import math
import pwd
import re
from itertools import product
from pathlib import Path

import jsonschema
import pytest
import yaml

from shoal.config import RunConfig, dump_yaml, load_config, reference, resolve_batch
from shoal.config.foreign import INSTEAD
from shoal.config.names import facts, names, sections
from shoal.data import cache
from shoal.errors import UserError

ROOT = Path(__file__).parents[1]


def load(*flags: str, file: Path | None = None, environ: dict[str, str] | None = None, **arguments):
    return load_config(file, list(flags), environ or {}, **arguments)


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def refusal(*flags: str, **sources) -> str:
    with pytest.raises(UserError) as caught:
        load(*flags, **sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_about_40_facts_beside_the_options_of_single_mechanisms():
    every_run = [fact for fact in facts() if not fact.readers and fact.section != "layout"]
    assert len(every_run) <= 50


def test_every_name_means_one_setting():
    written = [name for fact in facts() for name in (fact.key, fact.name, *fact.aliases, *fact.switches)]
    assert len(written) == len(set(written)) == len(names())


def another(fact) -> tuple[str, object]:
    """Some text that sets `fact` to another value than its default, and that value."""
    special = {
        "model.name": ("gpt2", "gpt2"),
        "data.path": ("a,b", ["a", "b"]),
        "data.eval_path": ("c", ["c"]),
        "log.report_to": ("tensorboard", ["tensorboard"]),
        "train.lr_scheduler_type": ("linear", "linear"),
        "train.learning_rate": ("1k", 1000.0),
        "train.adam_beta1": ("0.5", 0.5),
        "train.adam_beta2": ("0.5", 0.5),
        "train.label_smoothing": ("0.5", 0.5),
        "train.optim": ("muon", "muon"),
        "train.precision": ("bf16", "bf16-mixed"),
        "eval.quantize": ("int8", "int8"),
        "strategy.balance": ("3,1", "3,1"),
        "layout.zero_stage": ("2", 2),
        "layout.pp_schedule": ("gpipe", "gpipe"),
        "layout.offload": ("optimizer", "optimizer"),
        "train.gradient_checkpointing": ("selective", "selective"),
        "launch.nproc_per_node": ("3", 3),
        "launch.device": ("cuda", "gpu"),
        "data.eval_fraction": ("0.25", 0.25),
        "train.num_train_epochs": ("2.5", 2.5),
        "strategy.sync_every": ("1k", "1000"),
        "strategy.averaging": ("bmuf", "bmuf"),
        "strategy.aggregation": ("median", "median"),
        "strategy.trim": ("0.3", 0.3),
        "strategy.topology": ("ring", "ring"),
        "strategy.normalize": ("sum", "sum"),
        "strategy.codec": ("int8", "int8"),
        "strategy.error_feedback": ("true", True),
        **{
            f"strategy.{name}": ("0.25", 0.25)
            for name in (
                "error_decay",
                "outer_lr",
                "outer_momentum",
                "mixing",
                "guard",
                "guard_drift",
                "density",
                "codec_momentum",
                "demo_decay",
            )
        },
    }
    if fact.key in special:
        return special[fact.key]
    if fact.info.annotation is bool:
        return ("false", False) if fact.info.default else ("true", True)
    if fact.info.annotation is str:
        return "elsewhere", "elsewhere"
    return "1k", 1000.0 if fact.info.annotation is float else 1000


def value_of(resolved, fact):
    return getattr(getattr(resolved.config, fact.section), fact.field)


@pytest.mark.parametrize("fact", facts(), ids=lambda fact: fact.key)
def test_every_setting_is_read_from_every_source_and_the_origin_says_which(fact, tmp_path):
    text, value = another(fact)
    assert value_of(load(), fact) != value
    file = recipe(tmp_path, f"# first line\n{fact.section}:\n  {fact.field}: {json.dumps(text)}\n")
    variable = f"SHOAL_{fact.name.upper()}"
    for resolved, origin in [
        (load(fact.flag, text), f"flag {fact.flag}"),
        (load(f"{fact.flag.replace('-', '_').replace('__', '--', 1)}={text}"), None),
        (load("--" + fact.key, text), f"flag --{fact.key}"),
        (load("--" + fact.key.replace("_", "-"), text), None),
        (load(environ={variable: text}), variable),
        (load(file=file), f"{file}:3"),
        (load(**{fact.name: text}), f"argument {fact.name}"),
        *((load(f"--{alias}", text), f"flag --{alias}") for alias in fact.aliases),
    ]:
        assert value_of(resolved, fact) == value
        assert type(value_of(resolved, fact)) is type(value)
        assert origin in (None, resolved.origins[fact.key])
        others = {key for key, source in resolved.origins.items() if source != "default"}
        assert others == {fact.key}


def test_a_later_source_wins_over_an_earlier_one(tmp_path):
    file, environ = recipe(tmp_path, "train: {seed: 1}"), {"SHOAL_SEED": "2"}
    assert load(file=file).config.train.seed == 1
    assert load(file=file, environ=environ).config.train.seed == 2
    assert load("--seed", "3", file=file, environ=environ).config.train.seed == 3
    assert load("--seed", "3", "--seed", "4").config.train.seed == 4


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--exact"], True),
        (["--no-exact"], False),
        (["--no_exact"], False),
        (["--exact", "true"], True),
        (["--exact", "false"], False),
        (["--exact=False"], False),
        (["--exact", "--seed", "1"], True),
    ],
)
def test_spellings_of_yes_and_no(words, value):
    resolved = load(*words)
    assert resolved.config.train.exact is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--bf16"], "bf16-mixed"),
        (["--no-bf16"], "32-true"),
        (["--bf16", "true"], "bf16-mixed"),
        (["--bf16", "False"], "32-true"),
        (["--fp16", "false"], "auto"),
        (["--fp16"], "16-mixed"),
        (["--precision", "bf16"], "bf16-mixed"),
        (["--mixed-precision", "no"], "32-true"),
        ([], "auto"),
    ],
)
def test_spellings_of_precision(words, value):
    assert load(*words).config.train.precision == value


def test_parameters_in_fp16_are_refused_with_the_reason():
    assert refusal("--precision", "16-true").endswith("use --precision 16-mixed")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e9", 2 * 10**9), ("1B", 10**9), ("10M", 10**7), ("4k", 4000), ("1.5k", 1500), ("7", 7)],
)
def test_sizes(text, value):
    assert load("--max-steps", text).config.train.max_steps == value


@pytest.mark.parametrize("words", [["a,b"], ["a", "b"], ["a", "--data", "b"], ["a, b"]])
def test_lists(words):
    assert load("--data", *words, "--seed", "1").config.data.path == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["Smith, John.txt"], ["Smith, John.txt"]),
        (["Smith, J*.txt"], ["Smith, J*.txt"]),
        (["[a,b].txt"], ["[a,b].txt"]),
        (["b.txt,Smith, John.txt,x"], ["b.txt", "Smith, John.txt", "x"]),
        (["a.txt,b.txt"], ["a.txt", "b.txt"]),
        (["Smith, John.txt", "b.txt", "--data", "x,b.txt"], ["Smith, John.txt", "b.txt", "x", "b.txt"]),
        (["s3://b/1", "s3://b/2,s3://b/3"], ["s3://b/1", "s3://b/2", "s3://b/3"]),
    ],
)
def test_a_comma_in_a_path_that_exists_parts_nothing(tmp_path, monkeypatch, words, value):
    monkeypatch.chdir(tmp_path)
    for name in ("Smith, John.txt", "a.txt", "b.txt"):
        Path(name).touch()
    assert load("--data", *words).config.data.path == value
    if len(words) == 1:
        assert load(file=recipe(tmp_path, f"data: {json.dumps(words[0])}")).config.data.path == value


def test_a_comma_in_a_path_survives_in_a_list_of_a_file(tmp_path):
    assert load(file=recipe(tmp_path, "data: ['a,b.txt', c]")).config.data.path == ["a,b.txt", "c"]


def test_other_tools_words():
    assert load("--strategy", "ddp").config.strategy.name == "allreduce"
    assert load("--optim", "adamw_torch").config.train.optim == "adamw"
    assert load("--resume").config.checkpoint.resume_from_checkpoint == "latest"
    assert load("--report-to", "none").config.log.report_to == []


def test_dimensions_of_the_model_keep_their_types(tmp_path):
    flags = [
        "--model.hidden-size",
        "4k",
        "--model.eps",
        "1e-5",
        "--model.tied",
        "false",
        "--model.act",
        "gelu",
    ]
    expected = {"hidden_size": 4000, "eps": 1e-5, "tied": False, "act": "gelu"}
    assert load(*flags).config.model.overrides == expected
    file = recipe(tmp_path, "model: {name: lstm, hidden_size: 4k, eps: 1e-5, tied: false, act: gelu}")
    resolved = load(file=file)
    assert resolved.config.model.overrides == expected
    assert resolved.config.model.name == "lstm"
    assert resolved.origins["model.hidden_size"] == f"{file}:1"


@pytest.mark.parametrize(
    "word", ["no", "On", "y", "012", "0x10", "1:30", "1e-3", "1_000", "2024-01-01", ".inf"]
)
def test_a_word_of_a_recipe_means_what_it_means_behind_the_flag(word, tmp_path):
    """Whatever YAML would make of it. Both take it alike, or both refuse it."""

    def taken(*flags, **sources):
        try:
            return load(*flags, **sources).config
        except UserError as error:
            return error.change

    for fact in facts():
        file = recipe(tmp_path, f"{fact.section}: {{{fact.field}: {word}}}\n")
        assert taken(file=file) == taken(f"{fact.flag}={word}"), fact.key


def test_documented_words_that_yaml_takes_for_truth_values(tmp_path):
    text = (
        "train: {mixed_precision: no, gradient_checkpointing: no}\nstrategy: {normalize: no, balance: no}\n"
    )
    config = load(file=recipe(tmp_path, text)).config
    assert (config.train.precision, config.train.gradient_checkpointing) == ("32-true", "none")
    assert (config.strategy.normalize, config.strategy.balance) == ("no", "off")
    assert load("--model.tied", "no", "--model.rope", "on").config.model.overrides == {
        "tied": False,
        "rope": True,
    }
    nested = recipe(
        tmp_path, "model: {rope_scaling: {factor: 1e-3, truncate: no, kind: linear, original: ~}}\n"
    )
    scaling = {"factor": 1e-3, "truncate": False, "kind": "linear", "original": None}
    assert load(file=nested).config.model.overrides == {"rope_scaling": scaling}


PATHS = ("model", "data", "tokenizer", "eval_path", "cache_dir", "output_dir", "resume_from_checkpoint")


@pytest.mark.parametrize("name", PATHS)
def test_the_home_folder_is_meant_alike_everywhere(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    fact = names()[name]
    file = recipe(tmp_path, f"{fact.section}: {{{fact.field}: ~/x}}\n")
    for resolved in (
        load(fact.flag, "~/x"),
        load(f"{fact.flag}=~/x"),
        load(environ={f"SHOAL_{name.upper()}": "~/x"}),
        load(file=file),
        load(**{name: "~/x"}),
    ):
        assert value_of(resolved, fact) in ("/home/me/x", ["/home/me/x"])
    assert value_of(load(fact.flag, "org/name~1"), fact) in ("org/name~1", ["org/name~1"])


def test_a_section_may_be_written_as_its_primary_setting(tmp_path):
    config = load(file=recipe(tmp_path, "model: lstm\ndata: [a.txt, b.txt]\nstrategy: ddp\ntrain:\n")).config
    assert (config.model.name, config.data.path, config.strategy.name) == (
        "lstm",
        ["a.txt", "b.txt"],
        "allreduce",
    )
    assert RunConfig(model="lstm").model.name == "lstm"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sede", "1"], "--sede: there is no such flag; did you mean --seed"),
        (["--seed"], "--seed: no value follows"),
        (["--seed", "--exact"], "--seed: no value follows"),
        (["--seed", "x"], "--seed: 'x' does not fit; it should be a whole number"),
        (["--max-steps", "1.5"], "it should be a whole number"),
        (["--threads", "0"], "--threads: '0' does not fit; it should be 1 or more, or auto"),
        (["--lr", "nan"], "--lr: 'nan' does not fit"),
        (["--optim", "adm"], "it should be 'adamw', 'adamw-8bit', 'muon', 'sgd' or 'onebit-adam'"),
        (["--warmup-steps", "2.5"], "whole number of steps, or a share"),
        (["--balance", "3,x"], "one share a worker such as 3,1"),
        (["--exact=maybe"], "--exact"),
        (["stray"], "stray: it belongs to no flag"),
        (["--no-seed"], "--no-seed: there is no such flag"),
        (["--deepspeed", "x"], "--strategy zero3"),
        (["--betas", "0.9"], "--adam-beta1 and --adam-beta2 do it"),
        (["--sample_packing", "true"], "--packing does it, and is on"),
        (["--frobnicate", "1"], "`shoal train --help` lists the flags"),
    ],
)
def test_bad_flags_are_refused_in_one_line(words, expected):
    assert expected in refusal(*words)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("train:\n  sede: 1\n", 2, "train.sede: there is no such setting; did you mean seed"),
        ("train:\n  max-steps: 1\n  lerning_rate: 1\n", 3, "did you mean learning_rate"),
        ("sede: 1\n", 1, "did you mean seed"),
        ("train:\n  deepspeed: x\n", 2, "--strategy zero3"),
        ("train:\n  evaluation_strategy: steps\n", 2, "give the number of steps: --eval-steps"),
        ("data:\n  max_steps: 4\n", 2, "did you mean max_steps in train"),
        ("\ntrian: {seed: 1}\n", 2, "did you mean train"),
        ("train:\n  seed: x\n", 2, "train.seed: 'x' does not fit; it should be a whole number"),
        ("train:\n  exact: 7\n", 2, "train.exact: '7' does not fit"),
        ("train: 5\n", 1, "write keys below `train:`"),
        ("model: [5]\n", 1, "model.name: ['5'] does not fit"),
        ("train:\n  seed: 1\n  seed: 2\n", 3, "seed is already set at"),
        ("train: [\n", 2, "not YAML"),
        ("- a\n", 1, "not a mapping"),
        ("train:\n  seed: !!python/object/apply:os.getcwd []\n", 2, "not YAML"),
    ],
)
def test_bad_recipes_are_refused_with_file_and_line(tmp_path, text, line, expected):
    file = recipe(tmp_path, text)
    message = refusal(file=file)
    assert message.startswith(f"{file}:{line}")
    assert expected in message


def test_all_values_that_do_not_fit_are_told_at_once(tmp_path):
    file = recipe(tmp_path, "train:\n  seed: x\n  global_batch_size: y\n")
    message = refusal(file=file)
    assert f"{file}:2 train.seed" in message
    assert f"{file}:3 train.global_batch_size" in message


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    assert load(file=recipe(tmp_path, "\ufefftrain: {seed: 7}\n")).config.train.seed == 7


def test_unreadable_recipes(tmp_path):
    assert "No such file" in refusal(file=tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"train: \xff")
    assert "byte 7: not UTF-8" in refusal(file=tmp_path / "binary.yaml")


ODD = [
    10**5000,
    "9" * 5000,
    "1e999999999",
    "1e400",
    b"x",
    {1: 2},
    object(),
    "\0",
    "\x1b[31m\n",
    "x" * 10**5,
    [],
    [[None]],
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_values_are_taken_or_refused_in_one_line(odd):
    for name in ["model.any", "bf16", *(fact.name for fact in facts())]:
        assert_one_line(**{name: odd})


def assert_one_line(**sources) -> None:
    """What comes of it can be handed on; or else it is refused with a line that can be read."""
    said = ""
    try:
        resolved = load(**sources)
        assert dump_yaml(resolved)
        assert json.dumps(resolved.config.model_dump())
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 3000


@pytest.mark.parametrize(
    "value", ["!!int x", "!!timestamp x", "!!bool maybe", "[" * 3000, "&a [*a]", "!!set {a}", "{[a]: b}"]
)
def test_odd_yaml_is_taken_or_refused_in_one_line(value, tmp_path):
    for key in ("train: {seed: ", "model: {any: ", "data: {path: "):
        assert_one_line(file=recipe(tmp_path, f"{key}{value}}}\n"))


def test_paths_from_python_may_be_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        data=Path("~/a,b"), eval_path=[Path("c")], output_dir=Path("runs/x"), model=Path("m")
    ).config
    assert (config.data.path, config.data.eval_path) == (["/home/me/a,b"], ["c"])
    assert (config.checkpoint.output_dir, config.model.name) == ("runs/x", "m")


def test_environment_tells_near_misses_from_strangers():
    assert "did you mean SHOAL_SEED" in refusal(environ={"SHOAL_SEDE": "1"})
    names = [
        "SHOAL_SERVICE_HOST",
        "SHOAL_PORT",
        "SHOAL_VERSION",
        "SHOAL_WORLD_SIZE",
        "SHOAL_STORE_FD",
        "SEED",
    ]
    strangers = dict.fromkeys(names, "1")
    assert load(environ=strangers).config == load().config


def test_what_kubernetes_sets_for_a_service_is_no_setting():
    names = ["", *{f"_{name.upper()}" for fact in facts() for name in (fact.name, *fact.aliases)}]
    ends = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
    strangers = {f"SHOAL{name}_{end}": "tcp://10.96.0.1:80" for name in names for end in ends}
    assert load(environ=strangers).config == load().config


def test_a_user_without_a_home_needs_one_only_for_the_cache(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert load().config.data.cache_dir == ""
    assert cache.folder_of(load("--cache-dir", "/scratch").config.data.cache_dir) == Path("/scratch")
    for given in ((), ("--cache-dir", "~/scratch")):
        with pytest.raises(UserError, match=r"--cache-dir.*: this user has no home folder; .* or set HOME"):
            cache.folder_of(load(*given).config.data.cache_dir)
    assert dump_yaml(load())


def test_folders_are_filled_in():
    resolved = load("--model", "/models/gpt2", environ={"XDG_CACHE_HOME": "/scratch"})
    assert resolved.config.data.cache_dir == "/scratch/shoal"
    assert resolved.origins["data.cache_dir"] == "XDG_CACHE_HOME"
    assert resolved.config.checkpoint.output_dir == "runs/gpt2"
    assert load().config.data.cache_dir == str(Path.home() / ".cache" / "shoal")


def test_the_dump_reads_back_the_same_and_names_every_origin(tmp_path):
    flags = [word for fact in facts() for word in (fact.flag, another(fact)[0])]
    resolved = load(*flags, "--model.rope", "{a: [1, 2], b: '# no comment'}", "--model.eps", "1e-5")
    dumped = recipe(tmp_path, dump_yaml(resolved))
    assert load(file=dumped).config == resolved.config
    for fact in facts():
        line = next(line for line in dumped.read_text().splitlines() if line.startswith(f"  {fact.field}:")
                    and line.endswith(f"# flag {fact.flag}"))  # fmt: skip
        assert yaml.safe_load(line)


def test_the_record_survives_the_way_to_a_worker():
    config = load("--model.eps", "1e-5", "--model.layers", "[1, 2]", "--data", "a,b").config
    assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump()))) == config


def test_the_schema_takes_what_is_dumped_and_refuses_unknown_keys():
    schema = reference.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(dump_yaml(load("--model.hidden-size", "64"))), schema)
    jsonschema.validate({"model": "lstm", "train": {"max_steps": "10M"}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"sede": 1}}, schema)


def test_the_page_and_the_help_are_the_definition():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.markdown(), "run: shoal config docs > docs/configuration.md"
    for fact in facts():
        assert f"`{fact.flag}`" in page
        verb = "evaluate" if "evaluate" in fact.readers else "train"
        assert re.search(rf"^  {fact.flag}( |$)", reference.help_text(verb), re.MULTILINE)
    assert all(definition.__doc__ for definition in sections().values())


# batch arithmetic, for every small combination

SOME = [None, *range(1, 13), 24, 32]


def batch_of(workers: int, total: int | None, each: int | None, turns: int | None):
    train = {
        "global_batch_size": total,
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": turns,
    }
    return resolve_batch(RunConfig(train=train), workers)


def test_a_batch_keeps_what_was_given_or_is_refused():
    resolved = 0
    for workers, total, each, turns in product(range(1, 6), SOME, SOME, SOME):
        try:
            batch = batch_of(workers, total, each, turns)
        except UserError:
            continue
        resolved += 1
        assert total in (None, batch.global_batch_size)
        assert each in (None, batch.per_device_train_batch_size)
        assert batch.micro_batches * batch.per_device_train_batch_size == batch.global_batch_size
        assert batch.micro_batches >= workers
        assert batch.accumulation == math.ceil(batch.micro_batches / workers)
        if turns:
            assert batch.accumulation == turns
            assert batch.global_batch_size == batch.per_device_train_batch_size * turns * workers
    assert resolved > 1000


def test_any_two_give_the_third():
    for workers, each, turns in product(range(1, 6), repeat=3):
        total = each * turns * workers
        three = batch_of(workers, total, each, turns)
        assert three == batch_of(workers, None, each, turns)
        assert three == batch_of(workers, total, None, turns)
        assert three == batch_of(workers, total, each, None)


def test_without_accumulation_the_worker_count_does_not_change_the_step():
    for total, each, workers in product(SOME, SOME, range(2, 5)):
        try:
            several = batch_of(workers, total, each, None)
        except UserError:
            continue
        alone = batch_of(1, total, each, None)
        assert several.micro_batches == alone.micro_batches
        assert several.per_device_train_batch_size == alone.per_device_train_batch_size


def test_defaults_of_the_batch():
    assert batch_of(2, None, None, None).global_batch_size == 16
    assert batch_of(2, None, None, None).per_device_train_batch_size == 4
    assert batch_of(1, None, 5, None).global_batch_size == 20
    assert batch_of(1, 12, None, None).per_device_train_batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "equation"),
    [
        ((2, 8, 4, 3), "4 per device * 3 accumulation * 2 workers = 24, not 8"),
        ((1, 9, 4, None), "9 / 4 = 2.25 is not a whole number of micro-batches"),
        ((5, 32, 8, None), "32 / --per-device-train-batch-size 8 = 4 micro-batches, fewer than workers"),
        ((2, 9, None, 2), "9 / (2 accumulation * 2 workers) = 2.25"),
        ((0, None, None, None), "a run needs a worker"),
    ],
)
def test_a_contradiction_prints_the_equation(arguments, equation):
    with pytest.raises(UserError) as caught:
        batch_of(*arguments)
    assert equation in str(caught.value)


def test_a_recipe_may_be_flat(tmp_path):
    resolved = load(file=recipe(tmp_path, "learning_rate: 1e-4\nbf16: true\nstrategy: diloco\nmodel: gpt2\n"))
    config = resolved.config
    assert (config.train.learning_rate, config.train.precision) == (1e-4, "bf16-mixed")
    assert (config.strategy.name, config.model.name) == ("diloco", "gpt2")


def test_all_that_is_wrong_with_a_recipe_is_said_at_once(tmp_path):
    file = recipe(tmp_path, "train:\n  sede: 1\n  steps: 2\nbetas: 3\n")
    message = refusal(file=file)
    assert "3 problems" in message
    for line, change in ((2, "did you mean seed"), (3, "--max-steps does it"), (4, "--adam-beta1")):
        assert f"{file}:{line} " in message
        assert change in message


EXCLUSIONS = [
    ("train:\n  max_steps: 9\n", ["--num-train-epochs", "2"], {"max_steps": 0, "num_train_epochs": 2.0}),
    ("train:\n  num_train_epochs: 2\n", ["--max-steps", "9"], {"max_steps": 9}),
    ("train:\n  max_steps: 9\n", ["--epochs", "2", "--max-steps", "3"], {"max_steps": 3}),
    (
        "train: {global_batch_size: 16, per_device_train_batch_size: 4}\n",
        ["--gradient-accumulation-steps", "2"],
        {"global_batch_size": None, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    (
        "train: {global_batch_size: 16, gradient_accumulation_steps: 4}\n",
        ["--per-device-train-batch-size", "2"],
        {"global_batch_size": 16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": None},
    ),
    (
        "train: {global_batch_size: 16}\n",
        ["--per-device-train-batch-size", "2"],
        {"global_batch_size": 16, "per_device_train_batch_size": 2},
    ),
]


@pytest.mark.parametrize(("text", "words", "expected"), EXCLUSIONS)
def test_a_flag_wins_over_a_file_also_where_it_excludes_another_setting(tmp_path, text, words, expected):
    train = load(*words, file=recipe(tmp_path, text)).config.train
    assert {name: getattr(train, name) for name in expected} == expected


def test_a_strategy_of_a_flag_takes_the_place_of_the_files_layout(tmp_path):
    whole = load("--strategy", "allreduce", file=recipe(tmp_path, "strategy: zero3\n")).config
    assert whole.layout.zero_stage is None
    cut = load("--strategy", "allreduce", file=recipe(tmp_path, "layout: {zero_stage: 3}\n")).config
    assert cut.layout.zero_stage == 3


def test_python_gives_sections_as_dicts_and_hears_what_it_meant():
    config = load_config(None, [], {}, model={"name": "gpt2", "hidden_size": 64}, train={"seed": 3}).config
    assert (config.model.name, config.model.overrides, config.train.seed) == ("gpt2", {"hidden_size": 64}, 3)
    for arguments, said in (
        ({"sede": 1}, "did you mean seed"),
        ({"train": {"steps": 1}}, "--max-steps does it"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(None, [], {}, **arguments)


def test_no_name_of_elsewhere_is_a_name_of_ours():
    assert not INSTEAD.keys() & {name.rpartition(".")[2] for name in names()}
    named = {word for text in INSTEAD.values() for word in re.findall(r"--([a-z0-9-]+)", text)}
    beside = {"best", "no-packing"}
    assert named - beside <= {name.replace("_", "-") for name in names()}


@pytest.mark.parametrize("verb", ["train", "prepare", "evaluate", "config"])
def test_the_help_fits_80_columns_and_a_verb_shows_what_it_reads(verb):
    text = reference.help_text(verb)
    assert max(map(len, text.splitlines())) <= 80
    assert ("--learning-rate" in text) == (verb in ("train", "config"))
    assert ("--quantize" in text) == (verb == "evaluate")


@pytest.mark.parametrize(
    ("word", "shown", "left_out"),
    [
        ("lr", ["--learning-rate", "--outer-lr"], "--data"),
        ("--lr", ["--learning-rate"], "--data"),
        ("diloco", ["--sync-every", "--fragments", "--strategy takes"], "--learning-rate"),
        ("gpt2", ["--model takes"], "--data"),
        ("checkpoint", ["--resume-from-checkpoint"], "--data"),
    ],
)
def test_the_help_answers_a_word(word, shown, left_out):
    text = reference.help_text("train", word)
    assert all(flag in text for flag in shown)
    assert f"{left_out} " not in text


def test_the_help_of_a_word_that_nothing_is_about_is_refused():
    with pytest.raises(UserError, match="no flag is about it"):
        reference.help_text("train", "frobnicate")
