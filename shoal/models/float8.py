"""Linear layers whose matrix products are taken in 8 bits: torchao's, with a scale a tensor, set anew each time.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 4: inputs and weights as e4m3, gradients as e5m2,
sums in float32. Replaces bf16 products where the processor multiplies 8 bits twice as fast; parameters, activations
and what is between linear layers are held as in bf16-mixed. The head is left out, as torchtitan's recipe does.
"""

from typing import Any

import torch
from torch import nn

from shoal.errors import UserError

MULTIPLE = 16  # what the instructions ask of both sizes of a matrix
ADA = (8, 9)  # the compute capability from which a GPU has them


def use_float8(model: Any, device: torch.device) -> None:
    """Have the linear layers of `model` but its head multiply in float8; on a CPU with the same numbers in float32.

    Call it before the model is cut. Names and parameters stay. Raises UserError where the GPU is too old, or no layer
    has sizes that the instructions take.
    """
    asked = "--precision fp8-mixed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < ADA:
        found = f"{torch.cuda.get_device_name(device)} has no instructions for float8"
        raise UserError(asked, found, "take bf16-mixed")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    taken = {
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not any(n % MULTIPLE for n in module.weight.shape)
    }
    if not taken:
        found = f"{type(model).__name__} has no linear layer whose sizes are multiples of {MULTIPLE}"
        raise UserError(asked, found, "take bf16-mixed, or another model")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # seconds to import

    config = Float8LinearConfig(emulate=device.type == "cpu")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: module in taken)
