"""GPT-2 (Radford et al. 2019), with the parameter names of Hugging Face's GPT2LMHeadModel."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from torchref import ops
from torchref.config import GPT2Config
from torchref.decoder import Block, Decoder, Ops, Step, Tape, embedding


class Conv1D(nn.Module):
    """A linear map whose weight is (in, out), as GPT-2's files store it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return x @ self.weight + self.bias

    def third(self, index: int, x: Tensor) -> Tensor:
        """Only q, k or v (0, 1, 2), which lie side by side along the output."""
        width = self.weight.shape[1] // 3
        part = slice(index * width, (index + 1) * width)
        return x @ self.weight[:, part] + self.bias[part]


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, float32 at least inside."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class GPT2Attention(nn.Module):
    """Parameters of attention."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)


class GPT2MLP(nn.Module):
    """Parameters of the feed-forward."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.c_proj = Conv1D(config.n_inner, config.n_embd)


class GPT2Block(Block):
    """Pre-norm attention, then a pre-norm MLP."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def ops(self) -> Ops:
        """See `Block.ops`."""
        return {
            **self.attention_ops(self.config.n_head, self.config.n_head, self.ln_1.weight.dtype),
            "attn_norm": self.ln_1,
            "attn.q": lambda x: self.attn.c_attn.third(0, x),
            "attn.k": lambda x: self.attn.c_attn.third(1, x),
            "attn.v": lambda x: self.attn.c_attn.third(2, x),
            "attn.out": self.attn.c_proj,
            "mlp_norm": self.ln_2,
            "mlp.up": self.mlp.c_fc,
            "mlp.act": lambda x: ops.activation(x, self.config.activation),
            "mlp.down": self.mlp.c_proj,
        }

    def forward(self, tape: Tape, stream: Tensor, step: Step) -> Tensor:
        """See `Block.forward`."""
        stream = tape("attn_residual", stream, self.attend(tape, tape("attn_norm", stream), step))
        up = tape("mlp.up", tape("mlp_norm", stream))
        return tape("mlp_residual", stream, tape("mlp.down", tape("mlp.act", up)))


class GPT2Model(nn.Module):
    """Parameters under `transformer.`."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT2LMHead(Decoder):
    """GPT-2 with its language-model head, tied to the embedding or not."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.vocab_size, self.positions_limit = config.vocab_size, config.n_positions
        self.kv_heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """See `Decoder.tie`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def blocks(self) -> Sequence[Block]:
        """See `Decoder.blocks`."""
        return cast("list[Block]", list(self.transformer.h))

    def ops(self) -> Ops:
        """See `Decoder.ops`."""
        return {
            "embed.tokens": self.transformer.wte,
            "embed.positions": self.transformer.wpe,
            "embed.sum": ops.add,
            "mask": ops.attention_mask,
            "final_norm": self.transformer.ln_f,
            "logits": lambda x: ops.logits(x, self.lm_head.weight),
        }

    def embed(self, tape: Tape, ids: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """See `Decoder.embed`."""
        tokens = tape("embed.tokens", ids)
        return tape("embed.sum", tokens, tape("embed.positions", positions)), None
