"""The same model as two stages cut by hand, on torch's own 1F1B schedule, as its tutorial has it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from bench.jobs import GLOBAL_BATCH
from bench.peers import common

FIRST_LAYERS = 4  # of six: the head costs as much as one and a third


class Part(nn.Module):
    """The layers of one stage, with the embeddings before the first ones and the head behind the last."""

    def __init__(self, model: LlamaForCausalLM, rank: int) -> None:
        super().__init__()
        layers: Any = model.model.layers
        self.rotary = model.model.rotary_emb
        self.embed = model.model.embed_tokens if rank == 0 else None
        self.layers = nn.ModuleList(layers[:FIRST_LAYERS] if rank == 0 else layers[FIRST_LAYERS:])
        self.norm = model.model.norm if rank else None
        self.head = model.lm_head if rank else None

    def forward(self, given: Tensor) -> Tensor:
        """Token ids to hidden states, or hidden states to logits."""
        hidden = given if self.embed is None else self.embed(given)
        positions = torch.arange(given.shape[1])[None]
        turned = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=turned, position_ids=positions)
        if self.norm is None or self.head is None:
            return hidden
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over a micro-batch."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    part = Part(common.llama(), rank)
    tied: Any = part.embed if part.head is None else part.head
    stage = PipelineStage(part, rank, dist.get_world_size(), torch.device("cpu"))
    schedule = Schedule1F1B(stage, GLOBAL_BATCH // job.batch, next_token_loss)
    optimizer = common.adamw(part.parameters())
    record = common.Record(job.metrics)
    for batch in DataLoader(common.Windows(job.windows), GLOBAL_BATCH, drop_last=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            if rank == 0:
                schedule.step(batch["input_ids"])
            else:
                schedule.step(target=batch["labels"], return_outputs=False)
        dist.all_reduce(tied.weight.grad)
        clip(part, tied.weight if rank else None)
        optimizer.step()
        optimizer.zero_grad()
        record.step()


def clip(part: Part, counted_elsewhere: nn.Parameter | None) -> None:
    """By the norm of both stages' gradients."""
    own = [p.grad for p in part.parameters() if p is not counted_elsewhere]
    total = nn.utils.get_total_norm(grad for grad in own if grad is not None).square()
    dist.all_reduce(total)
    nn.utils.clip_grads_with_norm_(part.parameters(), 1.0, total.sqrt())


if __name__ == "__main__":
    main()
