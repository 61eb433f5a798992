"""What a run is: every setting with its type, default, meaning, and the other names people know it by."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shoal.config.layout import LayoutConfig
from shoal.config.optimizers import OPTIMIZERS, OptimizerTraits
from shoal.config.section import Section, fact
from shoal.config.strategy import StrategyConfig
from shoal.config.values import (
    Device,
    Number,
    Optimizer,
    PathName,
    Paths,
    Plain,
    Precision,
    Recompute,
    Threads,
    Trackers,
    Warmup,
    Whole,
    Workers,
    guess,
)

MOST = 10**6  # samples in a step: the arithmetic of batches tries divisors one by one


class ModelConfig(Section):
    """Which model. Every further key is a dimension of its Hugging Face config, as in hidden_size: 64."""

    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)
    primary: ClassVar[str] = "name"
    __pydantic_extra__: dict[str, Plain] = Field(init=False)

    name: PathName = fact("llama-tiny", "a preset, a Hugging Face folder or a hub name", "model_name_or_path")

    @model_validator(mode="before")
    @classmethod
    def _typed_dimensions(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value if key == "name" else guess(value) for key, value in given.items()}

    @property
    def overrides(self) -> dict[str, Any]:
        """The dimensions that were set, by the names of the model's Hugging Face config."""
        return dict(self.model_extra or {})


class DataConfig(Section):
    """What the model learns from, and how text becomes windows of tokens."""

    primary: ClassVar[str] = "path"

    path: Paths = fact(
        ["builtin"], "files, folders, globs, URLs, hf:NAME, or builtin", "train_file", min_length=1
    )
    text_field: str = fact("text", "the field or column that holds the text", "text_column")
    tokenizer: PathName = fact(
        "auto", "a folder or hub name; auto = the model's own, else train a BPE", "tokenizer_name"
    )
    vocab_size: Whole = fact(4096, "tokens in a BPE that is trained here", ge=257)
    split_special_tokens: bool = fact(
        False, "encode special tokens that are written in the text as plain text, not as the token"
    )
    sequence_length: Whole = fact(
        256, "tokens in a window", "max_length", "max_seq_length", "seq_length", "block_size", ge=2
    )
    packing: bool = fact(
        True, "lay documents end to end in windows; off = one document a row, filled up with padding"
    )
    eval_path: Paths = fact(
        [], "documents to validate on; none = hold out a part of the data", "validation_file"
    )
    eval_fraction: Number = fact(
        0.02, "share of the documents held out when eval_path is not given", "validation_split", ge=0, lt=1
    )
    cache_dir: PathName = fact(
        "", "where prepared data lies; empty = $XDG_CACHE_HOME/shoal or ~/.cache/shoal"
    )


class TrainConfig(Section):
    """The optimisation: how long, how much at once, how fast, in which arithmetic."""

    task: str = fact("causal-lm", "what is learnt")
    max_steps: Whole = fact(0, "steps to train for; 0 = by epochs", ge=0)
    num_train_epochs: Number | None = fact(
        None,
        "passes over the data when max_steps is 0; empty = 1, of the built-in corpus 0.5",
        "epochs",
        gt=0,
    )
    global_batch_size: Whole | None = fact(
        None, "samples in a step over all workers; empty = 16", "train_batch_size", ge=1, le=MOST
    )
    per_device_train_batch_size: Whole | None = fact(
        None,
        "samples in a micro-batch; empty = 4",
        "micro_batch_size",
        "batch_size",
        "train_micro_batch_size_per_gpu",
        ge=1,
        le=MOST,
    )
    gradient_accumulation_steps: Whole | None = fact(
        None,
        "micro-batches a worker takes in a step; empty = what follows from the other two",
        "accumulate_grad_batches",
        ge=1,
        le=MOST,
    )
    learning_rate: Number | None = fact(
        None,
        "the highest rate, reached after warm-up; empty = 3e-3 from random weights, 2e-5 from trained ones",
        "lr",
        ge=0,
    )
    min_lr: Number = fact(0.0, "the rate that the schedule falls to at the end", "min_learning_rate", ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = fact(
        "cosine", "how the rate falls after warm-up", "lr_scheduler"
    )
    warmup_steps: Warmup = fact(0.1, "steps of warm-up; below 1 = share of all steps", "warmup_ratio", ge=0)
    label_smoothing: Number = fact(
        0.0,
        "share of each label that is spread over the vocabulary, in training",
        "label_smoothing_factor",
        ge=0,
        lt=1,
    )
    weight_decay: Number = fact(0.1, "decoupled decay of the matrices", ge=0)
    max_grad_norm: Number = fact(
        1.0,
        "the global norm gradients are clipped to; 0 = off",
        "gradient_clipping",
        "gradient_clip_val",
        ge=0,
    )
    optim: Optimizer = fact("adamw", "the optimizer", "optimizer")
    adam_beta1: Number = fact(0.9, "decay of Adam's first moment", of="adamw adamw-8bit muon", ge=0, lt=1)
    adam_beta2: Number = fact(
        0.95, "decay of Adam's second moment", of="adamw adamw-8bit muon onebit-adam", ge=0, lt=1
    )
    adam_epsilon: Number = fact(
        1e-8, "what Adam adds to the root of the second moment", of="adamw adamw-8bit muon onebit-adam", gt=0
    )
    precision: Precision = fact(
        "auto",
        "arithmetic; auto = bf16-mixed where the processor has the instructions",
        "mixed_precision",
        switches={"bf16": ("bf16-mixed", "32-true"), "fp16": ("16-mixed", "auto")},
    )
    gradient_checkpointing: Recompute = fact(
        "none",
        "layers whose activations are computed again in the backward pass; selective = every other one",
        "activation_checkpointing",
        "activation_checkpoint_mode",
    )
    compile: bool = fact(False, "compile the model with torch.compile", "torch_compile")
    seed: Whole = fact(42, "fixes the weights, the order of the data and every mask", ge=0)
    exact: bool = fact(
        False, "sum gradients in one fixed tree: the same bytes at any worker count", "full_determinism"
    )
    threads: Threads = fact(
        "auto", "threads of a worker; auto = OMP_NUM_THREADS, or its share of the cores (1 with --exact)"
    )
    max_nonfinite_steps: Whole = fact(3, "stop after so many steps in a row without a finite gradient", ge=1)

    @property
    def optimizer(self) -> OptimizerTraits:
        """What the optimizer is."""
        return OPTIMIZERS[self.optim]


class EvalConfig(Section):
    """When the model is validated."""

    eval_steps: Whole = fact(0, "validate every so many steps; 0 = only at the end", ge=0)
    eval_on_start: bool = fact(False, "validate before the first step too")
    early_stopping_patience: Whole = fact(
        0, "end after so many evaluations in a row without a better one; 0 = never", "early_stopping", ge=0
    )
    quantize: Literal["none", "int8", "int4"] = fact(
        "none",
        "of `shoal evaluate`: hold the weights in so few bits, and tell what it costs",
        of="evaluate",
    )


class CheckpointConfig(Section):
    """Where the run is written, how often, and what it goes on from."""

    output_dir: PathName = fact("", "the folder of the run; empty = runs/<model>", "out_dir")
    save_steps: Whole = fact(500, "save every so many steps; 0 = only at the end", ge=0)
    save_total_limit: Whole = fact(2, "checkpoints kept beside the best one", ge=1)
    resume_from_checkpoint: PathName = fact(
        "", "latest or the folder of a checkpoint; empty = start anew", "resume"
    )
    overwrite_output_dir: bool = fact(False, "replace an earlier run in output_dir")

    @property
    def begins_anew(self) -> bool:
        """Whether a run starts in its folder, perhaps from another's checkpoint, rather than going on there."""
        resumed, folder = self.resume_from_checkpoint, Path(self.output_dir).resolve()
        if resumed in ("", "latest"):
            return not resumed
        return folder not in (Path(resumed).resolve(), Path(resumed).resolve().parent)


class LogConfig(Section):
    """What a run reports, and where."""

    logging_steps: Whole = fact(10, "print every so many steps", ge=1)
    run_name: str = fact("", "what the banner and summary.json call the run")
    report_to: Trackers = fact([], "trackers that also get the metrics: tensorboard")
    memory_report: bool = fact(False, "tell at the end what held how many bytes when a step held the most")
    ledger: bool = fact(False, "record which rank computed which sample, for `shoal audit`")


class LaunchConfig(Section):
    """How many workers, and where."""

    nproc_per_node: Workers = fact(
        "auto",
        "workers on this machine; auto = as many as GPUs (without: cores) and batch allow",
        "num_processes",
        "devices",
    )
    device: Device = fact(
        "auto",
        "what workers compute on; auto = a GPU each where there are some, else the cores",
        switches={"use_cpu": ("cpu", "auto")},
    )


def _opened_by(section: type[Section]) -> BeforeValidator:
    """Lets a section be written as its primary field alone, or left empty in a file."""

    def open_section(given: Any) -> Any:
        if given is None:
            return {}
        return {section.primary: given} if section.primary and isinstance(given, str | list) else given

    return BeforeValidator(open_section, json_schema_input_type=section | str if section.primary else section)


class RunConfig(BaseModel):
    """A whole run. Built from nothing but defaults it is the job of `shoal train`."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: Annotated[ModelConfig, _opened_by(ModelConfig)] = ModelConfig.model_construct()
    data: Annotated[DataConfig, _opened_by(DataConfig)] = DataConfig.model_construct()
    train: Annotated[TrainConfig, _opened_by(TrainConfig)] = TrainConfig.model_construct()
    strategy: Annotated[StrategyConfig, _opened_by(StrategyConfig)] = StrategyConfig.model_construct()
    layout: Annotated[LayoutConfig, _opened_by(LayoutConfig)] = LayoutConfig.model_construct()
    eval: Annotated[EvalConfig, _opened_by(EvalConfig)] = EvalConfig.model_construct()
    checkpoint: Annotated[CheckpointConfig, _opened_by(CheckpointConfig)] = CheckpointConfig.model_construct()
    log: Annotated[LogConfig, _opened_by(LogConfig)] = LogConfig.model_construct()
    launch: Annotated[LaunchConfig, _opened_by(LaunchConfig)] = LaunchConfig.model_construct()
