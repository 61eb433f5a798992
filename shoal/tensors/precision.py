"""One policy for the dtypes of everything, under every layout and strategy."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shoal.errors import ShoalError, UserError

# The "...-true" precisions compute in the dtype that they hold.
HELD = {"64-true": torch.float64, "32-true": torch.float32, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Policy:
    """The dtype of each part of the training state, of activations, and of the products of linear layers."""

    name: str
    parameters: torch.dtype
    gradients: torch.dtype
    reduction: torch.dtype
    optimizer: torch.dtype
    compute: torch.dtype
    linear: torch.dtype

    @property
    def scales_loss(self) -> bool:
        """Whether small gradients would underflow in the dtype of the products."""
        return self.compute == torch.float16

    @property
    def rounds_by_chance(self) -> bool:
        """Whether parameters are held in so few bits that updates rounded to the nearest would be lost."""
        return self.parameters == torch.bfloat16

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.compute == self.parameters:
            return nullcontext()
        return torch.autocast(device.type, self.compute)

    def __str__(self) -> str:
        held = {part: str(getattr(self, part)).removeprefix("torch.") for part in self.__dataclass_fields__}
        return f"{held.pop('name')} ({', '.join(f'{part} {dtype}' for part, dtype in held.items())})"

    def check(
        self,
        params: Iterable[torch.Tensor],
        state: Iterable[torch.Tensor],
        reduced: Iterable[torch.dtype] = (),
    ) -> None:
        """Raise ShoalError where parameters, gradients, optimizer `state` or sums have another dtype than here."""
        for p in params:
            self._expect("a parameter", self.parameters, p.dtype)
            if p.grad is not None:
                self._expect("a gradient", self.gradients, p.grad.dtype)
        for tensor in state:
            # 8-bit state also has scales, and tensors too small for codes.
            beside = self.optimizer == torch.uint8 and tensor.dtype == self.parameters
            if tensor.dim() and not beside:  # the count of steps is a scalar of its own dtype
                self._expect("optimizer state", self.optimizer, tensor.dtype)
        for dtype in reduced:
            self._expect("sums of gradients", self.reduction, dtype)

    def _expect(self, what: str, dtype: torch.dtype, found: torch.dtype) -> None:
        if found != dtype:
            raise ShoalError(
                f"--precision {self.name} holds {what} in {dtype}, found {found}; please report it"
            )


def resolve(precision: str, device: torch.device) -> Policy:
    """The policy named `precision`; "auto" is bf16-mixed where the device computes in bf16, else 32-true."""
    if precision == "auto":
        precision = "bf16-mixed" if has_bf16(device) else "32-true"
    held = HELD.get(precision, torch.float32)
    # A sum in bf16 would stand still after a few hundred micro-batches.
    summed = torch.promote_types(held, torch.float32)
    mixed = {"bf16-mixed": torch.bfloat16, "fp8-mixed": torch.bfloat16, "16-mixed": torch.float16}
    compute = mixed.get(precision, held)
    linear = torch.float8_e4m3fn if precision == "fp8-mixed" else compute
    return Policy(precision, held, summed, summed, held, compute, linear)


def as_it_is(model: nn.Module) -> Policy:
    """The policy of a model that is trained in the dtypes it has: the one of the widest.

    Raises UserError for a dtype in which gradients would be lost.
    """
    params = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    for name, dtype in params.items():
        if dtype not in HELD.values():
            kind = str(dtype).removeprefix("torch.")
            change = "hold parameters in float32, and compute in bfloat16 under torch.autocast"
            raise UserError("shoal.Session", f"{name} is {kind}: its gradients would be lost", change)
    widest = max(params.values(), key=lambda dtype: dtype.itemsize, default=torch.float32)
    return resolve(next(name for name, dtype in HELD.items() if dtype == widest), torch.device("cpu"))


def has_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16 products (on Linux the processor's own flags are read)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = next((line for line in cpuinfo.open() if line.lower().startswith(("flags", "features"))), "")
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags.split()))
