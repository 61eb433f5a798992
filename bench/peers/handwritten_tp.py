"""The same loop with torch's own tensor parallelism, as its tutorial and torchtitan have it: layers of DTensors.

Attention and MLP are cut column- and rowwise with sequence parallel between them, embedding, head and loss by the
vocabulary. All workers compute the same windows: a step is as many micro-batches as there are workers.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from bench.peers import common

WHOLE, CUT = Replicate(), Shard(1)
LAYER = {
    "input_layernorm": SequenceParallel(),
    "self_attn": PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": CUT}, desired_input_kwarg_layouts={"hidden_states": WHOLE}
    ),
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel(output_layouts=CUT),
    "post_attention_layernorm": SequenceParallel(),
    "mlp": PrepareModuleInput(input_layouts=(CUT,), desired_input_layouts=(WHOLE,)),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(output_layouts=CUT),
}
AROUND = {
    "model.embed_tokens": RowwiseParallel(input_layouts=WHOLE, output_layouts=CUT),
    "model.norm": SequenceParallel(),
    "lm_head": ColwiseParallel(input_layouts=CUT, output_layouts=Shard(-1), use_local_output=False),
}


def cut(model: LlamaForCausalLM) -> None:
    """Have each worker hold its part of every layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, LAYER)
    parallelize_module(model, mesh, AROUND)
    model.lm_head.weight = model.model.embed_tokens.weight


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """The mean cross entropy of windows [rows, tokens]; positions are said, since the model sees a part of them."""
    logits = model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    dist.init_process_group("gloo")
    model = common.llama()
    cut(model)
    optimizer = common.adamw(model.parameters())
    record = common.Record(job.metrics)
    turns = dist.get_world_size()
    for number, batch in enumerate(DataLoader(common.Windows(job.windows), job.batch, drop_last=True)):
        with loss_parallel():
            with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
                loss = loss_of(model, batch["input_ids"])
            (loss / turns).backward()
        if number % turns == turns - 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            record.step()


if __name__ == "__main__":
    main()
