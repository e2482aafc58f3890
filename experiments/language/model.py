"""A decoder-only T5: Hugging Face's own blocks and stack, without cross-attention, under a tied head."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin, T5Config
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.t5.modeling_t5 import T5PreTrainedModel, T5Stack

SHAPES: dict[str, dict[str, Any]] = {
    "micro": {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128},
    "tiny": {"d_model": 256, "num_layers": 4, "num_heads": 8, "d_kv": 32, "d_ff": 1024},
    "twice": {"d_model": 384, "num_layers": 4, "num_heads": 6, "d_kv": 64, "d_ff": 1536},
    "small": {"d_model": 512, "num_layers": 6, "num_heads": 8, "d_kv": 64, "d_ff": 2048},
    "large": {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_kv": 64, "d_ff": 3072},
}


class T5DecoderLM(T5PreTrainedModel, GenerationMixin):
    """The decoder of a T5 as a language model: relative position biases, RMS norm, tied head.

    Parameters
    ----------
    config : of the decoder; made by `decoder_config`.

    References
    ----------
    Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", JMLR 2020.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.decoder = T5Stack(config)
        if self.decoder.embed_tokens is None:  # transformers 4 leaves them to the model around the stack
            self.decoder.set_input_embeddings(nn.Embedding(config.vocab_size, config.d_model))
        for block in self.decoder.block:
            del block.layer[1]  # cross-attention: there is no encoder
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_input_embeddings(new_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b t v] of the next token; with `labels` (the tokens themselves) also the mean loss."""
        options.pop("return_dict", None)
        seen = self.decoder(input_ids=input_ids, attention_mask=attention_mask, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = seen.last_hidden_state[:, kept]
        logits = self.lm_head(hidden * self.config.d_model**-0.5)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        parts = {name: value for name, value in seen.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **parts)


def decoder_config(shape: str, vocab_size: int, *, end: int = 0, gated: bool = True) -> T5Config:
    """The configuration of a shape by name.

    Parameters
    ----------
    shape : a name in `SHAPES`.
    vocab_size : tokens.
    end : the token that ends a document; also begins and pads.
    gated : gated GELU feed-forward, as in T5 1.1; otherwise ReLU.
    """
    return T5Config(
        vocab_size=vocab_size,
        is_decoder=True,
        is_encoder_decoder=False,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=True,
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=end,
        decoder_start_token_id=end,
        **SHAPES[shape],
    )
