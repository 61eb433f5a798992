"""Weights in int8 or int4, by torchao: inference in less memory, at some loss in perplexity.

Only the linear layers are quantised. Embeddings and the head stay as they are: they cost most in perplexity, and the
loss reads the head's weight itself. Activations and sums stay in the model's arithmetic ("weight only").
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 32  # input features that share a scale in int4


def quantize(model: nn.Module, kind: str) -> None:
    """Hold the weights of the linear layers of `model` as `kind`, in place. Of a weight [rows, columns] then stay

    - int8: a byte for each element, and a scale for each row, of the dtype that the weight had
    - int4: the same byte for each element, for torchao packs two into one only on GPUs; and a scale and a zero point
      of one byte for each group of 32 columns, or for each row where 32 does not divide them
    """
    with _quiet():
        from torchao.quantization import quantize_
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for module in _linear(model):
        if module is not head:
            quantize_(module, _config(module, kind), filter_fn=lambda layer, name: True)


def weight_bytes(model: nn.Module) -> int:
    """The bytes that the parameters of a model take, quantised or not."""
    return sum(part.nbytes for p in model.parameters() for part in _parts(p.data))


def _config(module: nn.Linear, kind: str) -> Any:
    with _quiet():
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    if kind == "int8":
        return Int8WeightOnlyConfig()
    granularity = PerAxis(0) if module.in_features % GROUP else PerGroup(GROUP)
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)  # type: ignore[attr-defined]


def _linear(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if type(module) is nn.Linear)


def _parts(weight: Tensor) -> list[Tensor]:
    """The tensors of which one of torchao's is made; any other is its own."""
    names = getattr(weight, "tensor_data_names", None)
    return [getattr(weight, name) for name in names] if names else [weight]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torchao's lines about kernels that it was not built with."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
