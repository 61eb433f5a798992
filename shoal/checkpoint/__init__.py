"""Checkpoints: written aside, hashed, moved into place; nothing in them is ever executed.

checkpoint-500/
  manifest.json                  step, tokens, world size, size and SHA-256 of every file
  model/model.safetensors        parameters and buffers by name (and config.json: a Hugging Face folder)
  optimizer/state.safetensors    "parameter/part", for example "lm_head.weight/exp_avg"
  model/00001.safetensors ...    where a replica is held by several ranks, each writes its own pieces; the file's
  optimizer/00001.safetensors      metadata tells where they belong
  ranks/00001.safetensors        what only this rank holds: "sync/..."; where replicas differ "model/...",
                                   "optimizer/..." and "scaler/..." too
  state.json                     where the run stands
latest, best                     files that hold the name of a checkpoint
"""

from shoal.checkpoint.folder import find, named
from shoal.checkpoint.loading import Parts, load_model, load_optimizer, load_tensors, model_tensors
from shoal.checkpoint.progress import Progress, load_progress
from shoal.checkpoint.saving import Checkpoints, Tensors, rank_file, write
from shoal.system.run_folder import candidates

__all__ = [
    "Checkpoints",
    "Parts",
    "Progress",
    "Tensors",
    "candidates",
    "find",
    "load_model",
    "load_optimizer",
    "load_progress",
    "load_tensors",
    "model_tensors",
    "named",
    "rank_file",
    "write",
]
