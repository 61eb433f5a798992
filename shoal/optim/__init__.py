"""How a step changes the parameters: optimizers, their state, learning rates."""
