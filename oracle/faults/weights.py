"""Wrong parameters: what loading, converting and saving get wrong. They must show in the rung bits."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from oracle.candidate import Candidate
from oracle.faults.fault import Plant, with_parameters

Change = Callable[[ModelConfig, np.ndarray], np.ndarray]
"""A tensor in float32 to what is stored instead."""
LEAVES = ("weight", "kernel", "bias")
SEED = 77
"""Of what a mistake leaves to chance."""


def edited(name: str, change: Change) -> Plant:
    """One tensor changed; it stays in its dtype."""
    return edited_where(lambda candidate_name: candidate_name == name, change)


def edited_where(chosen: Callable[[str], bool], change: Change) -> Plant:
    """Every tensor of a chosen name changed; each stays in its dtype."""

    def plant(candidate: Candidate) -> Candidate:
        arrays = {name: np.asarray(array) for name, array in candidate.stored.items() if chosen(name)}
        changed = {n: change(candidate.config, a.astype(np.float32)).astype(a.dtype) for n, a in arrays.items()}
        return with_parameters(candidate, changed)

    return plant


def renamed(sources: Callable[[ModelConfig], dict[str, str]], leaves: tuple[str, ...] = LEAVES) -> Plant:
    """Modules hold the parameters (all, or some leaves) of other modules, `{module: where they come from}`."""

    def plant(candidate: Candidate) -> Candidate:
        moved = {
            f"{module}.{leaf}": candidate.stored[f"{source}.{leaf}"]
            for module, source in sources(candidate.config).items()
            for leaf in leaves
            if f"{source}.{leaf}" in candidate.stored
        }
        return with_parameters(candidate, moved)

    return plant


def is_kernel(name: str) -> bool:
    """A matrix of a projection."""
    return name.endswith(".kernel")


def is_matrix(name: str) -> bool:
    """A matrix of a projection, the embedding or the head."""
    return is_kernel(name) or name in ("embed.tokens.weight", "embed.positions.weight", "head.weight")


# -- Layout ----------------------------------------------------------------------------


def transposed(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Conv1D's (in, out) taken for Linear's (out, in)."""
    return kernel.T


def wrong_memory_order(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """The file's (out, in) buffer read as (in, out) without transposing: right shape, wrong places."""
    return np.ascontiguousarray(kernel.T).reshape(kernel.shape)


def packed_in_another_order(candidate: Candidate) -> Candidate:
    """The parts of a fused c_attn taken as key, query, value."""
    return renamed(
        lambda config: {
            f"layers.{i}.attn.{part}": f"layers.{i}.attn.{source}"
            for i in range(config.num_hidden_layers)
            for part, source in (("q", "k"), ("k", "q"))
        }
    )(candidate)


def packed_by_group(candidate: Candidate) -> Candidate:
    """A fused matrix that holds [queries, key, value] per key head (Megatron) read as all queries, keys, values."""
    c = candidate.config
    K, H = c.num_key_value_heads, c.head_dim
    changed: dict[str, np.ndarray] = {}
    for layer in range(c.num_hidden_layers):
        for leaf in ("kernel", "bias"):
            names = [f"layers.{layer}.attn.{part}.{leaf}" for part in "qkv"]
            if names[0] not in candidate.stored:
                continue
            parts = [np.asarray(candidate.stored[name]) for name in names]
            grouped = [part.reshape(*part.shape[:-1], K, part.shape[-1] // (K * H), H) for part in parts]
            fused = np.concatenate(grouped, axis=-2).reshape(*parts[0].shape[:-1], -1)
            ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
            changed |= dict(zip(names, np.split(fused, ends, axis=-1), strict=True))
    return with_parameters(candidate, changed)


def interleaved_columns(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """The columns of each head in the order of Meta's files: RoPE pairs side by side."""
    halves = array.reshape(*array.shape[:-1], -1, 2, config.head_dim // 2)
    return halves.swapaxes(-1, -2).reshape(array.shape)


def heads_reversed(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """The heads in the opposite order."""
    return array.reshape(*array.shape[:-1], -1, config.head_dim)[..., ::-1, :].reshape(array.shape)


def heads_rolled(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Each head's columns taken from its neighbour."""
    return np.roll(array, config.head_dim, axis=-1)


def rows_shifted(config: ModelConfig, table: np.ndarray) -> np.ndarray:
    """Row i holds what row i - 1 should."""
    return np.roll(table, 1, axis=0)


# -- Another tensor in its place -------------------------------------------------------


def lexicographic(config: ModelConfig) -> dict[str, str]:
    """Layer 2 is read from layer 10, because names were sorted as strings."""
    order = sorted(range(config.num_hidden_layers), key=str)
    return _layers(dict(enumerate(order)), config)


def reversed_layers(config: ModelConfig) -> dict[str, str]:
    """Layer i is read from layer L - 1 - i."""
    last = config.num_hidden_layers - 1
    return _layers({i: last - i for i in range(last + 1)}, config)


def _layers(sources: dict[int, int], config: ModelConfig) -> dict[str, str]:
    modules = ["attn_norm", *(f"attn.{part}" for part in ("q", "k", "v", "out")), "mlp_norm", "mlp.up", "mlp.down"]
    modules += ["mlp.gate"] if config.gated_mlp else []
    return {f"layers.{i}.{m}": f"layers.{source}.{m}" for i, source in sources.items() for m in modules if i != source}


def swapped(one: str, other: str) -> Plant:
    """Two modules of equal shape hold each other's parameters."""
    return renamed(lambda _: {one: other, other: one})


def copied(source: str, module: str) -> Plant:
    """A module holds another's parameters."""
    return renamed(lambda _: {module: source})


def untied_random(candidate: Candidate) -> Candidate:
    """The head is a tensor of its own, freshly initialised, where the model ties it."""
    c = candidate.config
    like = np.asarray(candidate.stored["embed.tokens.weight"])
    fresh = np.random.default_rng(SEED).normal(0, 0.02, like.shape).astype(like.dtype)
    untied = replace(candidate, config=replace(c, tie_word_embeddings=False))
    return with_parameters(untied, {"head.weight": fresh})


def wrongly_tied(candidate: Candidate) -> Candidate:
    """The embedding is used for the head, whose own tensor is left out."""
    stored = {name: array for name, array in candidate.stored.items() if name != "head.weight"}
    return replace(candidate, config=replace(candidate.config, tie_word_embeddings=True), stored=stored)


# -- Values ----------------------------------------------------------------------------


def bf16_read_as_fp16(name: str) -> Plant:
    """The bits of bfloat16 taken for those of float16."""

    def plant(candidate: Candidate) -> Candidate:
        bits = np.asarray(jnp.asarray(candidate.stored[name], jnp.bfloat16)).view(np.float16)
        # Over a bf16 file the tensor stays as wide as it was.
        wide = np.asarray(candidate.stored[name]).dtype.itemsize == 4
        return with_parameters(candidate, {name: bits.astype(np.float32) if wide else bits})

    return plant


def byte_order(name: str) -> Plant:
    """Big-endian bytes read as little-endian."""

    def plant(candidate: Candidate) -> Candidate:
        array = np.ascontiguousarray(candidate.stored[name])
        unsigned = array.view(f"u{array.dtype.itemsize}").byteswap()
        return with_parameters(candidate, {name: unsigned.view(array.dtype)})

    return plant


def flipped_bit(name: str) -> Plant:
    """One bit of one number's mantissa differs."""

    def plant(candidate: Candidate) -> Candidate:
        array = np.array(candidate.stored[name])
        unsigned = array.view(f"u{array.dtype.itemsize}")
        unsigned[3, 5] ^= 1 << (20 if array.dtype.itemsize == 4 else 4)
        return with_parameters(candidate, {name: array})

    return plant


def without(*names: str) -> Plant:
    """Parameters that were never loaded."""
    return lambda candidate: replace(candidate, stored={n: a for n, a in candidate.stored.items() if n not in names})


def zero(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Allocated and never filled."""
    return np.zeros_like(array)


def one_nan(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """One number is not a number."""
    spoilt = array.copy()
    spoilt[2, 3] = np.nan
    return spoilt


def random_init(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """The tensor as training begins with it."""
    return np.random.default_rng(SEED).normal(0, config.initializer_range, array.shape)


def other_revision(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Every number a little different, as after more training."""
    spread = np.sqrt(np.square(array).mean())
    return array + 0.02 * spread * np.random.default_rng(SEED).normal(size=array.shape)


def low_rank_update(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """A merged adapter of rank 2 (LoRA) is there on one side only."""
    rng = np.random.default_rng(SEED)
    down, up = rng.normal(size=(kernel.shape[0], 2)), rng.normal(size=(2, kernel.shape[1]))
    return kernel + 0.05 * kernel.std() * down @ up


def through_int8(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Quantised to 8 bits per column and back."""
    scale = np.abs(kernel).max(axis=0, keepdims=True) / 127
    return np.round(kernel / scale) * scale


def through_bfloat16(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Saved in half the width."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16)).astype(np.float32)


def through_float16(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Saved in half the width."""
    return array.astype(np.float16).astype(np.float32)


def negated(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """The sign is wrong."""
    return -array


def minus_one(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Norm weights stored as their distance from 1 (Gemma) and loaded as they are."""
    return array - 1


def scaled_by_width(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """Multiplied by sqrt(D): a scale of the forward pass folded into the tensor, or folded in twice."""
    return array * config.hidden_size**0.5


PADDING = 8
"""Rows of the vocabulary that stand for no token."""


def live_padding(module: str) -> Plant:
    """Rows beyond the tokenizer's ids hold random values instead of those of the file."""

    def rows(config: ModelConfig, table: np.ndarray) -> np.ndarray:
        live = table.copy()
        live[-PADDING:] = np.random.default_rng(SEED).normal(0, 1, live[-PADDING:].shape)
        return live

    def plant(candidate: Candidate) -> Candidate:
        planted = edited(f"{module}.weight", rows)(candidate)
        return replace(planted, real_ids=candidate.config.vocab_size - PADDING)

    return plant
