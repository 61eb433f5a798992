"""The recurrent language model: embedding, LSTM layers, linear head, as a Hugging Face model."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput


@strict
class LstmConfig(PreTrainedConfig):
    """The dimensions of the LSTM language model; `embedding_size` None is `hidden_size`."""

    model_type = "lstm"

    vocab_size: int = 32000
    hidden_size: int = 1024
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.embedding_size != self.hidden_size:
            self.tie_word_embeddings = False  # a tied head needs hidden states as wide as the embeddings
        super().__post_init__(**kwargs)


@dataclass
class LstmOutput(ModelOutput):
    """`state` [2, layers, B, H] is what the next tokens continue from: the hidden and the cell state."""

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    state: Tensor | None = None


class LstmPreTrainedModel(PreTrainedModel):
    """What body and language model share: the configuration and how weights begin."""

    config_class = LstmConfig
    base_model_prefix = "model"
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            for name, bias in module.named_parameters():
                if name.startswith("bias_ih"):  # gates: input, forget, cell, output; begin by remembering
                    nn.init.ones_(bias.detach().chunk(4)[1])


class LstmModel(LstmPreTrainedModel):
    """Embedding and LSTM layers; a token at position 0 begins a document, and finds an empty state."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size or config.hidden_size)
        between_layers = config.dropout if config.num_hidden_layers > 1 else 0.0
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=between_layers,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        state: Tensor | None = None,
        **unused: Any,
    ) -> LstmOutput:
        """Hidden states [B, T, H] of ids [B, T]; position 0 starts a document (no positions: one a row)."""
        embedded = self.dropout(self.embed_tokens(input_ids))
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) + (state is not None)
        starts = (position_ids == 0).expand_as(input_ids)
        if state is None:
            state = embedded.new_zeros(2, self.lstm.num_layers, len(input_ids), self.lstm.hidden_size)
        else:
            state = state.masked_fill(starts[None, None, :, :1], 0.0)
        run = self._run_pieces if starts[:, 1:].any() else self._run
        hidden, state = run(embedded, state, starts)
        return LstmOutput(last_hidden_state=self.dropout(hidden), state=state)

    def _run(self, embedded: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        hidden, last = self.lstm(embedded, tuple(state.unbind()))
        return hidden, torch.stack(last)

    def _run_pieces(self, embedded: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Documents as a batch of their own: each begins empty, the first of a row with the row's state."""
        begins = starts.clone()
        begins[:, 0] = True
        firsts = begins.flatten().nonzero().flatten()
        lengths = firsts.diff(append=firsts.new_tensor([begins.numel()])).tolist()
        in_row = begins.sum(dim=1)
        last_of_row = in_row.cumsum(0) - 1

        initial = state.new_zeros(*state.shape[:2], len(lengths), state.shape[-1])
        initial[:, :, last_of_row - in_row + 1] = state
        pieces = pack_sequence(embedded.flatten(0, 1).split(lengths), enforce_sorted=False)
        packed, last = self.lstm(pieces, tuple(initial.unbind()))
        hidden = torch.cat(unpack_sequence(packed)).view(*starts.shape, -1)
        return hidden, torch.stack(last)[:, :, last_of_row]


class LstmForCausalLM(LstmPreTrainedModel, GenerationMixin):
    """The body with a linear head over the vocabulary, tied to the embedding where the sizes allow."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.model = LstmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        state: Tensor | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> LstmOutput:
        """Logits [B, T, V] (of the last `logits_to_keep` tokens, 0: all), and the state to go on from."""
        output = self.model(input_ids, position_ids, state)
        output.logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        state: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The prompt, then one token a step; padding on the left stands at position 0, which resets."""
        if state is not None:
            return {"input_ids": input_ids[:, -1:], "state": state}
        positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": input_ids, "position_ids": positions}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # what is carried is `state`, of constant size


AutoConfig.register(LstmConfig.model_type, LstmConfig)
AutoModel.register(LstmConfig, LstmModel)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM)
