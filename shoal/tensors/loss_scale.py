"""Dynamic loss scaling: gradients of float16 activations are kept above the smallest number of float16."""

from torch import Tensor

from shoal.tensors.precision import Policy

FIRST = 2.0**16
FLOOR = 1.0
GROWTH = 2.0
BACKOFF = 0.5
GROWTH_INTERVAL = 2000  # steps


class Scaler:
    """What losses are multiplied by before the backward pass, and gradients divided by as soon as they are complete.

    Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with the constants of torch.amp.GradScaler.
    A step is skipped if the norm of its gradient is not finite: ranks that update by one gradient know the same norm,
    and so hold the same scale. Replicas that update alone each follow their own gradient: an overflow costs one
    replica one step, without an exchange about it; what they exchange is unscaled.

    The scale is a power of two, so that scaling rounds nothing. Outside of 16-mixed it stays 1, the floor.
    """

    def __init__(self, policy: Policy) -> None:
        self.dynamic = policy.scales_loss
        self.scale = FIRST if self.dynamic else FLOOR
        self.good_steps = 0  # in a row, at this scale

    def update(self, *, finite: bool) -> bool:
        """Adapt to a step whose gradient was `finite` or not; returns whether its scale could be lowered."""
        can_lower = self.scale > FLOOR
        if not finite:
            self.scale, self.good_steps = max(FLOOR, self.scale * BACKOFF), 0
        elif self.dynamic:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.scale, self.good_steps = self.scale * GROWTH, 0
        return can_lower

    def state_dict(self) -> dict[str, float]:
        """The scale and its steps; empty where it is constant."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.dynamic else {}

    def load_state_dict(self, state: dict[str, float] | dict[str, Tensor]) -> None:
        """Load what `state_dict` gave; an empty state changes nothing."""
        if self.dynamic and state:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])

    def metrics(self) -> dict[str, float]:
        """The scale of the next step, by metric name."""
        return {"train/loss_scale": self.scale} if self.dynamic else {}
