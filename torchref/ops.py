"""The operations all families are made of, each a function of tensors.

Compute dtype is that of the inputs. Norms, rotation, scores and softmax are
float32 inside, or float64 where the model is float64: float64 is never narrowed,
because the float64 model is the truth that errors are measured against.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MASKED = torch.finfo(torch.float32).min
"""Score of a position that may not be attended to, in every dtype; finite, so that no row is NaN."""


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def add(x: Float[Tensor, "B T D"], y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Sum of two streams."""
    return x + y


def attention_mask(
    slots: Int[Tensor, "B T"],
    key_slots: Int[Tensor, "S"],
    segments: Int[Tensor, "B T"] | None,
    key_segments: Int[Tensor, "B S"] | None,
    window: int | None = None,
) -> Bool[Tensor, "B 1 T S"]:
    """True where a token may attend: no later slot, and no other document or padding.

    With a window only the last `window` slots, its own included (Beltagy et al. 2020; Mistral).
    """
    ago = slots[:, None, :, None] - key_slots  # (B, 1, T, S)
    allowed = ago >= 0 if window is None else (ago >= 0) & (ago < window)
    if segments is None or key_segments is None:
        return allowed
    return allowed & (segments[:, None, :, None] == key_segments[:, None, None, :])


def layer_norm(
    x: Float[Tensor, "B T D"], weight: Float[Tensor, "D"], bias: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "B T D"]:
    """LayerNorm (Ba et al. 2016), computed wide and rounded once."""
    return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps).to(x.dtype)


def rms_norm(x: Float[Tensor, "B T D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "B T D"]:
    """RMSNorm (Zhang & Sennrich 2019), computed wide and rounded once."""
    mean_square = wide(x).pow(2).mean(dim=-1, keepdim=True)
    return (wide(x) * torch.rsqrt(mean_square + eps) * wide(weight)).to(x.dtype)


def split_heads(x: Float[Tensor, "B T O"], heads: int) -> Float[Tensor, "B N T H"]:
    """(B, T, N·H) to (B, N, T, H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B N T H"]) -> Float[Tensor, "B T O"]:
    """(B, N, T, H) to (B, T, N·H)."""
    return x.transpose(1, 2).flatten(-2)


def rotate_half(x: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
    """(a, b) to (-b, a), a and b the two halves of a head: the pairs are (i, i + H/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope(x: Float[Tensor, "B N T H"], angles: Float[Tensor, "B T R"], stretch: float = 1.0) -> Float[Tensor, "B N T H"]:
    """Rotary embedding (Su et al. 2021) in Hugging Face's half-split order; R = H / 2.

    Cosines and sines are multiplied by `stretch` (yarn's attention factor).
    """
    twice = torch.cat((angles, angles), dim=-1)[:, None]  # (B, 1, T, H): every head turns alike
    cos, sin = twice.cos() * stretch, twice.sin() * stretch
    return (wide(x) * cos + rotate_half(wide(x)) * sin).to(x.dtype)


def store(
    new: Float[Tensor, "B K T H"], buffer: Float[Tensor, "B K S H"], slots: Int[Tensor, "B T"]
) -> Float[Tensor, "B K S H"]:
    """The buffer with each row's new keys or values in its slots; a slot past the end is dropped."""
    rows, times = torch.nonzero(slots < buffer.shape[2], as_tuple=True)
    stored = buffer.clone()
    # Indices around a slice put their dimension first: both sides are (tokens, K, H).
    stored[rows, :, slots[rows, times]] = new[rows, :, times].to(buffer.dtype)
    return stored


def _repeat_kv(x: Float[Tensor, "B K S H"], heads: int) -> Float[Tensor, "B N S H"]:
    """Each kv head for the N / K query heads next to each other that read it (Ainslie et al. 2023)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def scores(q: Float[Tensor, "B N T H"], k: Float[Tensor, "B K S H"]) -> Float[Tensor, "B N T S"]:
    """q·k / sqrt(H) (Vaswani et al. 2017, eq. 1)."""
    keys = _repeat_kv(wide(k), q.shape[1])
    return wide(q) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5


def masked(scores: Float[Tensor, "B N T S"], allowed: Bool[Tensor, "B 1 T S"]) -> Float[Tensor, "B N T S"]:
    """Scores with MASKED in place of those that are not allowed."""
    return scores.masked_fill(~allowed, MASKED)


def softmax(masked: Float[Tensor, "B N T S"], dtype: torch.dtype) -> Float[Tensor, "B N T S"]:
    """Attention weights, computed wide and rounded to the compute dtype."""
    return torch.softmax(masked, dim=-1).to(dtype)


def context(weights: Float[Tensor, "B N T S"], v: Float[Tensor, "B K S H"]) -> Float[Tensor, "B N T H"]:
    """Weighted sum of values."""
    return weights.to(v.dtype) @ _repeat_kv(v, weights.shape[1])


def activation(x: Float[Tensor, "B T F"], kind: str) -> Float[Tensor, "B T F"]:
    """GELU, exact (`gelu`) or by tanh (`gelu_tanh`, GPT-2's), or SiLU."""
    if kind == "silu":
        return F.silu(wide(x)).to(x.dtype)
    return F.gelu(wide(x), approximate="tanh" if kind == "gelu_tanh" else "none").to(x.dtype)


def logits(x: Float[Tensor, "B T D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "B T V"]:
    """Vocabulary projection, float32 at least."""
    return F.linear(wide(x), wide(weight))
