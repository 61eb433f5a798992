"""Layers whose activations are computed again: the same bits from real models, and who is refused."""

import pytest
import torch
from torch import Tensor

from shoal.config import ModelConfig, load_config
from shoal.errors import UserError
from shoal.models.blocks import blocks
from shoal.models.isolation import packed_inputs
from shoal.models.loading import load
from shoal.models.loss import summed_cross_entropy
from shoal.models.recompute import recompute

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
MODELS = {
    "llama-tiny": {"intermediate_size": 48, "attention_dropout": 0.2},
    "gpt2-tiny": {"attn_pdrop": 0.2, "resid_pdrop": 0.2},
    "gpt-neox-tiny": {"intermediate_size": 48, "hidden_dropout": 0.2},
}


def gradients(name: str, which: str, bf16: bool) -> tuple[float, dict[str, Tensor], int]:
    """The loss, every gradient by name, and how often a layer's forward pass ran."""
    model = load(ModelConfig(name=name, **SIZES, **MODELS[name]), vocab_size=50, sequence_length=24, seed=1)
    ran = []
    for layer in blocks(model):
        layer.get_submodule("mlp").register_forward_pre_hook(lambda *_: ran.append(1))
    recompute(model, which)
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(50, (2, 24), generator=draw) for _ in range(2))
    documents = (torch.arange(24) // 10)[None].expand(2, -1)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = summed_cross_entropy(model, packed_inputs(ids, documents), labels)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(ran)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_keep_every_bit(name: str, bf16: bool) -> None:
    loss, grads, passes = gradients(name, "none", bf16)
    assert passes == 3
    for which, expected in (("full", 6), ("selective", 5)):
        again, others, passes = gradients(name, which, bf16)
        assert (again, passes) == (loss, expected)
        assert grads.keys() == others.keys()
        assert all(torch.equal(grads[each], others[each]) for each in grads)


def test_a_model_without_layers_is_refused() -> None:
    model = load(ModelConfig(name="lstm-tiny", hidden_size=16), vocab_size=50, sequence_length=8)
    recompute(model, "none")
    with pytest.raises(UserError, match="no list of layers"):
        recompute(model, "full")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--gradient-checkpointing"], "full"),
        (["--gradient_checkpointing", "true"], "full"),
        (["--gradient-checkpointing=false"], "none"),
        (["--activation-checkpointing", "selective"], "selective"),
        ([], "none"),
    ],
)
def test_the_flag_alone_means_full(words: list[str], meant: str) -> None:
    assert load_config(None, words, {}).config.train.gradient_checkpointing == meant
