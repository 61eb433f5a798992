"""The lean RMS norm computes what the model's own class does."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from shoal.models import norm


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: norm.rms_norm(h, w, 1e-5), inputs)


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16)])
def test_values_and_gradients_are_those_of_llamas_own_norm(shape):
    torch.manual_seed(0)
    own = LlamaRMSNorm(16, eps=1e-6)
    nn.init.uniform_(own.weight)
    results = []
    for forward in (own, lambda hidden: norm.rms_norm(hidden, own.weight, own.variance_epsilon)):
        hidden = torch.linspace(-2, 3, torch.Size(shape).numel()).view(shape).requires_grad_()
        out = forward(hidden)
        grads = torch.autograd.grad(out.square().sum(), (hidden, own.weight))
        results.append((out.detach(), *grads))
    for mine, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_only_a_plain_norm_is_replaced():
    model = nn.ModuleDict({"plain": LlamaRMSNorm(8), "shifted": GemmaRMSNorm(8), "other": nn.LayerNorm(8)})
    norm.use_fastest(model)
    assert [name for name, module in model.items() if "forward" in vars(module)] == ["plain"]


def test_a_norm_that_only_looks_plain_is_left_alone():
    class DoublingRMSNorm(LlamaRMSNorm):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = nn.Sequential(DoublingRMSNorm(8))
    norm.use_fastest(model)
    assert "forward" not in vars(model[0])


def test_other_dtypes_keep_the_models_own():
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    norm.use_fastest(model)
    assert torch.equal(model(ids).logits, before)
