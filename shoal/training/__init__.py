"""A training run: put together, resumed, the loop, evaluation, what is recorded."""
