"""Families of models: how their models are loaded and named. A family is one row of `FAMILIES`."""

from dataclasses import dataclass
from typing import Any

import transformers


@dataclass(frozen=True)
class Family:
    """Models with one kind of head, by the names that Hugging Face gives it."""

    auto_class: str  # of transformers
    pipeline_tag: str  # in a model card
    what: str  # in messages

    @property
    def auto(self) -> Any:
        """The class of transformers that loads its models."""
        return getattr(transformers, self.auto_class)

    def has(self, config: transformers.PreTrainedConfig, architecture: str) -> bool:
        """Whether a model class is this family's for models of such a configuration."""
        kinds = self.auto._model_mapping.get(type(config), ())
        return architecture in {kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))}


FAMILIES = {
    "causal-lm": Family("AutoModelForCausalLM", "text-generation", "causal language model"),
    "seq2seq-lm": Family("AutoModelForSeq2SeqLM", "translation", "encoder-decoder language model"),
    "masked-lm": Family("AutoModelForMaskedLM", "fill-mask", "masked language model"),
    "sequence-classification": Family(
        "AutoModelForSequenceClassification", "text-classification", "sequence classifier"
    ),
    "token-classification": Family(
        "AutoModelForTokenClassification", "token-classification", "token classifier"
    ),
    "question-answering": Family("AutoModelForQuestionAnswering", "question-answering", "reader of answers"),
    "image-classification": Family(
        "AutoModelForImageClassification", "image-classification", "image classifier"
    ),
    "audio-classification": Family(
        "AutoModelForAudioClassification", "audio-classification", "audio classifier"
    ),
}
CAUSAL = FAMILIES["causal-lm"]


def family_of(config: transformers.PreTrainedConfig) -> Family:
    """The family of the model class that a configuration names; causal language models if it names none.

    Raises KeyError where the class is of no family.
    """
    for architecture in config.architectures or ():
        for family in FAMILIES.values():
            if family.has(config, architecture):
                return family
        raise KeyError(architecture)
    return CAUSAL
