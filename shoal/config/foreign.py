"""What takes the place of settings that people know from elsewhere, and that shoal does not have under that name."""

ALWAYS = "it always does: leave it out"
PEFT = "adapters are not supported yet: all parameters are trained"
HUB = "not supported: upload the folder final/ with `hf upload`"
ONE_LAYOUT = "say how a replica is cut: --strategy zero3, --dp-shard, --tp, --pp or --cp"
EVERY = "give the number of steps: {}"

# By name, with underscores: of transformers' TrainingArguments, axolotl, LLaMA-Factory, torchtitan, Accelerate.
INSTEAD: dict[str, str] = {
    # how it is split
    "deepspeed": ONE_LAYOUT,
    "fsdp_config": ONE_LAYOUT,
    "zero_optimization": ONE_LAYOUT,
    "data_parallel_shard_degree": "--dp-shard does it",
    "data_parallel_replicate_degree": "--dp-replicate does it",
    "tensor_parallel_degree": "--tp does it",
    "tensor_model_parallel_size": "--tp does it",
    "pipeline_parallel_degree": "--pp does it",
    "pipeline_model_parallel_size": "--pp does it",
    "context_parallel_degree": "--cp does it",
    "sequence_parallel_size": "--cp does it",
    "ddp_backend": "gloo on processors, nccl on GPUs: leave it out",
    "ddp_find_unused_parameters": "parameters without a gradient are found by themselves: leave it out",
    "local_rank": "the engine sets it, as torchrun does: leave it out",
    "num_machines": "start one command a machine with torchrun or srun",
    # the data
    "dataset": "--data does it",
    "datasets": "--data does it",
    "dataset_name": "--data hf:NAME does it",
    "max_samples": "not supported: give fewer files to --data",
    "cutoff_len": "--sequence-length does it",
    "seq_len": "--sequence-length does it",
    "sequence_len": "--sequence-length does it",
    "sample_packing": "--packing does it, and is on",
    "pad_to_sequence_len": "--no-packing pads each row",
    "group_by_length": "not needed: windows are full; --no-packing takes rows as they come",
    "val_set_size": "--eval-fraction does it",
    "dataset_prepared_path": "--cache-dir does it",
    "overwrite_cache": "data that has changed is prepared anew by itself: leave it out",
    "preprocessing_num_workers": "all cores prepare data: leave it out",
    "dataset_num_proc": "all cores prepare data: leave it out",
    "dataloader_num_workers": "batches are read from memory maps, without workers: leave it out",
    "dataloader_pin_memory": ALWAYS,
    "dataloader_drop_last": "no sample is dropped: leave it out",
    "data_seed": "--seed does it",
    "chat_template": "not supported yet: conversations are no task yet",
    # the model
    "base_model": "--model does it",
    "model_id": "--model does it",
    "trust_remote_code": "not supported: no code of a model's folder is executed",
    "flash_attention": "the fastest attention that a model has is used: leave it out",
    "attn_implementation": "the fastest attention that a model has is used: leave it out",
    "use_lora": PEFT, "lora_r": PEFT, "lora_rank": PEFT, "lora_alpha": PEFT, "lora_target": PEFT, "adapter": PEFT,
    "finetuning_type": PEFT, "peft_config": PEFT,
    "load_in_8bit": "only plain weights are trained; shoal evaluate --quantize int8 measures them in 8 bits",
    "load_in_4bit": "only plain weights are trained; shoal evaluate --quantize int4 measures them in 4 bits",
    # the optimisation
    "betas": "--adam-beta1 and --adam-beta2 do it",
    "beta1": "--adam-beta1 does it",
    "beta2": "--adam-beta2 does it",
    "eps": "--adam-epsilon does it",
    "neftune_noise_alpha": "not supported",
    "steps": "--max-steps does it",
    "local_batch_size": "--per-device-train-batch-size does it",
    "per_device_eval_batch_size": "evaluation takes --per-device-train-batch-size: leave it out",
    "eval_batch_size": "evaluation takes --per-device-train-batch-size: leave it out",
    "auto_find_batch_size": "not supported: give --per-device-train-batch-size",
    "bf16_full_eval": "evaluation takes the precision of training: leave it out",
    "fp16_full_eval": "evaluation takes the precision of training: leave it out",
    "tf32": "not supported: --precision names the arithmetic",
    "torch_compile_backend": "--compile takes inductor: leave it out",
    # when
    "do_train": "shoal train trains: leave it out",
    "do_eval": "a run always ends with an evaluation: leave it out",
    "eval_strategy": EVERY.format("--eval-steps"),
    "evaluation_strategy": EVERY.format("--eval-steps"),
    "save_strategy": EVERY.format("--save-steps"),
    "logging_strategy": EVERY.format("--logging-steps"),
    "log_freq": "--logging-steps does it",
    "checkpoint_interval": "--save-steps does it",
    "load_best_model_at_end": "shoal export RUN --best gives it: the best checkpoint is always kept",
    "metric_for_best_model": "the task names it (eval/loss): leave it out",
    "greater_is_better": "the task says so: leave it out",
    "save_safetensors": ALWAYS,
    "save_only_model": "not supported: a checkpoint holds all that a run goes on from",
    # where
    "logging_dir": "--report-to tensorboard writes to tb/ in --output-dir",
    "disable_tqdm": "there is a bar on a terminal only: leave it out",
    "plot_loss": "--report-to tensorboard shows it; the numbers are in metrics.jsonl",
    "wandb_project": "--report-to wandb is not supported yet; metrics.jsonl has every number",
    "use_wandb": "--report-to wandb is not supported yet; metrics.jsonl has every number",
    "push_to_hub": HUB,
    "hub_model_id": HUB,
}  # fmt: skip


def instead(name: str) -> str:
    """What takes the place of the setting `name` (`-` and `_` alike, with or without a section); empty: not known."""
    return INSTEAD.get(name.replace("-", "_").rpartition(".")[2], "")
