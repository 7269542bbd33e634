"""What the reference says its model is: the sizes and constants that repairs of ops are made from.

They come from torchref's own reading of the reference's config.json, because the
candidate's config may be what is wrong.
"""

from dataclasses import dataclass

from oracle.reference import Reference
from torchref.config import GPT2Config, Rope
from torchref.llama import frequencies


@dataclass(frozen=True)
class Facts:
    """Sizes and constants of the reference's model."""

    width: int
    """D."""
    layers: int
    heads: int
    """N."""
    kv_heads: int
    """K."""
    head_dim: int
    """H."""
    eps: float
    """Of the norms, inside the square root."""
    centred: bool
    """The norms subtract the mean: LayerNorm, not RMSNorm."""
    activation: str
    """`gelu`, `gelu_tanh` or `silu`."""
    rope: Rope | None
    """None where positions are learned."""
    window: int | None = None
    """How many tokens each attends to; None for all before it."""

    @property
    def constants(self) -> tuple[float, ...]:
        """Numbers that an op of this model may hold as a constant."""
        roots = [float(n) ** power for n in (self.head_dim, self.width) for power in (0.5, -0.5)]
        turns = frequencies(self.rope, self.head_dim).tolist() if self.rope else []
        return (self.eps, *roots, *turns)


def of(reference: Reference) -> Facts:
    """The facts of a reference."""
    c = reference.truth.decoder.config
    if isinstance(c, GPT2Config):
        head_dim = c.n_embd // c.n_head
        return Facts(c.n_embd, c.n_layer, c.n_head, c.n_head, head_dim, c.layer_norm_epsilon, True, c.activation, None)
    heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    norms = c.rms_norm_eps, False
    return Facts(c.hidden_size, c.num_hidden_layers, *heads, *norms, c.activation, c.rope, c.sliding_window)
