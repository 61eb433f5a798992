"""Families of models: how their models are loaded and named. A family is one row of `FAMILIES`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Models of one kind of head, by the names that Hugging Face gives it."""

    auto_class: str  # of transformers
    pipeline_tag: str  # in a model card
    what: str  # in messages

    @property
    def auto(self) -> Any:
        """The class of transformers that loads its models."""
        import transformers

        return getattr(transformers, self.auto_class)


FAMILIES = {
    "causal-lm": Family("AutoModelForCausalLM", "text-generation", "causal language model"),
}
