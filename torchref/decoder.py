"""What the families share: running ops by tap name, the cache, and the way from ids to logits.

Tap names and shapes are a vocabulary shared with the program under test. The
code is not: nothing here knows that program.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from torchref import ops
from torchref.config import Config

Ops = Mapping[str, Callable[..., Tensor]]
"""What computes each tap, by the tap's name."""
Taps = dict[str, Tensor]


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table without values yet: `nn.Embedding` would draw them, which on the meta device loads torch's compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Tape:
    """Runs ops by name and keeps what they return, if there is a dict to keep it in.

    What the dict then holds under the name is what goes on, so that one of another class may change it.
    """

    def __init__(self, table: Ops, taps: Taps | None, prefix: str = ""):
        self.table, self.taps, self.prefix = table, taps, prefix

    def __call__(self, name: str, *inputs: Tensor | None) -> Tensor:
        """The op's output."""
        output = self.table[name](*inputs)
        if self.taps is None:
            return output
        self.taps[self.prefix + name] = output
        return self.taps.get(self.prefix + name, output)


@dataclass
class Cache:
    """Keys and values so far, per layer (B, K, S, H), and which of the S slots are real.

    A cached forward appends to it in place.
    """

    keys: list[Float[Tensor, "B K S H"]]
    values: list[Float[Tensor, "B K S H"]]
    segments: Int[Tensor, "B S"]
    """1 for a token, 0 for padding."""


@dataclass(frozen=True)
class Step:
    """What every layer of one forward reads."""

    mask: Bool[Tensor, "B 1 T S"]
    slots: Int[Tensor, "B T"]
    angles: Float[Tensor, "B T R"] | None
    cache: Cache | None


class Block(nn.Module, ABC):
    """One layer. `layer` is its index; parameters have Hugging Face's names, ops those of the taps."""

    layer: int
    norms_heads = False
    """Queries and keys are normalised head by head before they are rotated."""

    @abstractmethod
    def ops(self) -> Ops:
        """This layer's ops by tap name without `layers.i.`."""

    @abstractmethod
    def forward(self, tape: Tape, stream: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""

    def attention_ops(self, heads: int, kv_heads: int, dtype: torch.dtype) -> Ops:
        """The part of attention that has no parameters."""
        return {
            "attn.q_heads": lambda x: ops.split_heads(x, heads),
            "attn.k_heads": lambda x: ops.split_heads(x, kv_heads),
            "attn.v_heads": lambda x: ops.split_heads(x, kv_heads),
            "attn.q_rope": ops.rope,
            "attn.k_rope": ops.rope,
            "attn.keys": ops.store,
            "attn.values": ops.store,
            "attn.scores": ops.scores,
            "attn.masked": ops.masked,
            "attn.weights": lambda masked: ops.softmax(masked, dtype),
            "attn.context": ops.context,
            "attn.merged": ops.merge_heads,
            "attn_residual": ops.add,
            "mlp_residual": ops.add,
        }

    def attend(self, tape: Tape, normed: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T D"]:
        """Attention, from the normed stream to its output projection."""
        q = tape("attn.q_heads", tape("attn.q", normed))
        k = tape("attn.k_heads", tape("attn.k", normed))
        v = tape("attn.v_heads", tape("attn.v", normed))
        if self.norms_heads:
            q, k = tape("attn.q_norm", q), tape("attn.k_norm", k)
        if step.angles is not None:
            q = tape("attn.q_rope", q, step.angles)
            k = tape("attn.k_rope", k, step.angles)
        if step.cache is not None:
            k = step.cache.keys[self.layer] = self._append(tape, "attn.keys", k, step.cache.keys[self.layer], step)
            v = step.cache.values[self.layer] = self._append(
                tape, "attn.values", v, step.cache.values[self.layer], step
            )
        masked = tape("attn.masked", tape("attn.scores", q, k), step.mask)
        context = tape("attn.context", tape("attn.weights", masked), v)
        return tape("attn.out", tape("attn.merged", context))

    def _append(self, tape: Tape, name: str, new: Tensor, buffer: Tensor, step: Step) -> Tensor:
        return tape(name, new, F.pad(buffer, (0, 0, 0, new.shape[2])), step.slots)


class Decoder(nn.Module, ABC):
    """A language model: `model(ids)` gives logits."""

    config: Config
    vocab_size: int
    positions_limit: int | None
    """Rows of the learned position embedding, if there is one."""
    kv_heads: int
    head_dim: int

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The layers in order."""

    @abstractmethod
    def ops(self) -> Ops:
        """The ops outside the layers, by tap name."""

    @abstractmethod
    def embed(
        self, tape: Tape, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T R"] | None]:
        """The first residual stream, and the RoPE angles of a family that has them."""

    @abstractmethod
    def tie(self) -> None:
        """Make the head the token embedding, if the config says so."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the parameters."""
        return next(self.parameters()).dtype

    def run_op(self, tap: str, inputs: Sequence[Tensor | None]) -> Tensor:
        """The op that makes `tap`, with this model's parameters, on given inputs.

        Raises:
            KeyError: the model has no such tap.
        """
        if not tap.startswith("layers."):
            return self.ops()[tap](*inputs)
        _, layer, name = tap.split(".", 2)
        return self.blocks[int(layer)].ops()[name](*inputs)

    def empty_cache(self, batch: int) -> Cache:
        """A cache without slots, for a batch of `batch` rows."""

        def buffers() -> list[Tensor]:
            return [torch.zeros(batch, self.kv_heads, 0, self.head_dim, dtype=self.dtype) for _ in self.blocks]

        return Cache(buffers(), buffers(), torch.zeros(batch, 0, dtype=torch.long))

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        positions: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        past: Cache | None = None,
        taps: Taps | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits, float32 at least.

        Args:
            ids: token ids in [0, V).
            positions: what the position embedding or RoPE sees. By default 0, 1, 2, …
                after what is in `past`, not counting the padding of `attention_mask`.
            attention_mask: (B, T), false or 0 for padding, which may stand on either side.
            segments: document of each token; attention stays inside a document.
            past: a cache to continue; the new keys and values are appended to it.
            taps: filled with every activation by name, in execution order.

        Raises:
            ValueError: an id or position outside its embedding, or arguments that exclude each other.
        """
        given = _inputs(ids, positions, attention_mask, segments, past)
        self._check_range(ids, given.positions)
        tape = Tape(self.ops(), taps)
        stream, angles = self.embed(tape, ids, given.positions)
        mask = tape("mask", given.slots, given.key_slots, given.segments, given.key_segments)
        step = Step(mask, given.slots, angles, past)
        for block in self.blocks:
            stream = block(Tape(block.ops(), taps, f"layers.{block.layer}."), stream, step)
        return tape("logits", tape("final_norm", stream))

    def _check_range(self, ids: Tensor, positions: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"token ids reach from {ids.min()} to {ids.max()}; the vocabulary has {self.vocab_size}")
        if self.positions_limit is not None and int(positions.max()) >= self.positions_limit:
            raise ValueError(f"position {positions.max()} is past the last of {self.positions_limit} learned positions")


@dataclass(frozen=True)
class _Inputs:
    positions: Int[Tensor, "B T"]
    slots: Int[Tensor, "B T"]
    key_slots: Int[Tensor, "S"]
    segments: Int[Tensor, "B T"] | None
    key_segments: Int[Tensor, "B S"] | None


def _inputs(
    ids: Tensor, positions: Tensor | None, attention_mask: Tensor | None, segments: Tensor | None, past: Cache | None
) -> _Inputs:
    """What the arguments of a forward mean for its ops; appends to the cache's segments."""
    if segments is not None and (attention_mask is not None or past is not None):
        raise ValueError("segments exclude attention_mask and past: give one of them")
    padded = attention_mask is not None or past is not None
    if padded:
        # Padding is a document of its own: no row is left without a key to attend to.
        segments = _real(ids, attention_mask)
    key_segments = segments
    if past is not None and segments is not None:
        key_segments = past.segments = torch.cat((past.segments, segments), dim=1)
    time = ids.shape[1]
    source = time if key_segments is None else key_segments.shape[1]
    slots = torch.arange(source - time, source).expand(ids.shape)
    if positions is None and padded and key_segments is not None:
        positions = (key_segments.cumsum(dim=1) - 1).clamp(min=0)[:, source - time :]
    return _Inputs(
        positions=slots if positions is None else positions,
        slots=slots,
        key_slots=torch.arange(source),
        segments=segments,
        key_segments=key_segments,
    )


def _real(ids: Tensor, attention_mask: Tensor | None) -> Int[Tensor, "B T"]:
    """1 for a token, 0 for padding."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.long)
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, ids {list(ids.shape)}; expected one entry per id"
        )
    return attention_mask.long()
