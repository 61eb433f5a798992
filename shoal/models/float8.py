"""Linear layers whose matrix products are taken in 8 bits: torchao's, with a scale a tensor, set anew each time.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 4: inputs and weights as e4m3, gradients as e5m2,
sums in float32. Replaces bf16 products where the processor multiplies 8 bits twice as fast; parameters, activations
and what is between linear layers are held as in bf16-mixed. The head is left out, as torchtitan's recipe does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_linear_utils import swap_linear_layers

from shoal.errors import UserError

MULTIPLE = 16  # what the instructions ask of both sizes of a matrix
ADA = (8, 9)  # the compute capability from which a GPU has them


class Linear(Float8Linear):
    """torchao's, with the input that a GPU would have under autocast on a CPU too."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        found: Tensor = super().forward(input)
        return found


def use_float8(model: Any, device: torch.device, parts: int = 1) -> None:
    """Have the linear layers of `model` but its head multiply in float8; a CPU rounds alike, and uses float32.

    Call it before the model is cut, and say into how many `parts` its layers will be. Names and parameters stay.
    Raises UserError where the GPU is too old, or no layer has sizes that the instructions take.
    """
    asked = "--precision fp8-mixed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < ADA:
        found = f"{torch.cuda.get_device_name(device)} has no instructions for float8"
        raise UserError(asked, found, "take bf16-mixed")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    taken = {
        module for module in linear if not any(size % (MULTIPLE * parts) for size in module.weight.shape)
    }
    if not taken:
        found = f"{type(model).__name__} has no linear layer whose sizes are multiples of {MULTIPLE * parts}"
        raise UserError(asked, found, "take bf16-mixed, or another model")
    # The tokens of a micro-batch are the inner size of one product, and need no multiple of 16 when filled up.
    config = Float8LinearConfig(emulate=device.type == "cpu", pad_inner_dim=True)
    swap_linear_layers(
        model,
        lambda module: Linear.from_float(module, config=config),
        module_filter_fn=lambda module, name: module in taken,
    )
