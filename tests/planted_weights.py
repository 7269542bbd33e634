"""Wrong weights to plant in tiny models: each a function of the true tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

SQUARE = "llama-square-biased-tied-linear"
Tensors = dict[str, np.ndarray]
Fault = Callable[[Tensors, np.random.Generator], Mapping[str, np.ndarray]]


def on(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    return lambda tensors, rng: {name: change(tensors[name])}


def on_all(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    return lambda tensors, rng: {name: change(array) for name, array in tensors.items()}


def exchange(*pairs: tuple[str, str]) -> Fault:
    return lambda tensors, rng: {a: tensors[b] for a, b in pairs} | {b: tensors[a] for a, b in pairs}


def layers(order: list[int]) -> Fault:
    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        inside = [name.split(".", 2) for name in tensors if name.startswith("layers.")]
        return {f"layers.{i}.{path}": tensors[f"layers.{order[int(i)]}.{path}"] for _, i, path in inside}

    return fault


def packed(columns: Callable[[int, int], np.ndarray]) -> Fault:
    """q, k and v as they come out of the fused matrix when its columns are read in another order."""

    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        changed: Tensors = {}
        for i in range(3):
            for leaf in ("kernel", "bias"):
                names = [f"layers.{i}.attn.{part}.{leaf}" for part in "qkv"]
                fused = np.concatenate([tensors[name] for name in names], axis=-1)
                heads = 4
                index = columns(heads, fused.shape[-1] // (3 * heads))
                changed |= zip(names, np.split(fused[..., index], 3, axis=-1), strict=True)
        return changed

    return fault


def heads_moved(array: np.ndarray, order: list[int], axis: int) -> np.ndarray:
    parts = np.split(array, len(order), axis=axis)
    return np.concatenate([parts[i] for i in order], axis=axis)


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows of each head as Meta's files have them."""
    grid = array.reshape(*array.shape[:-1], heads, 2, -1)
    return grid.swapaxes(-1, -2).reshape(array.shape)


def folded(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    norm = tensors["layers.1.mlp_norm.weight"]
    names = [f"layers.1.mlp.{name}.kernel" for name in ("gate", "up")]
    return {name: norm[:, None] * tensors[name] for name in names} | {"layers.1.mlp_norm.weight": np.ones_like(norm)}


def adapter(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    changed: Tensors = {}
    for i in range(3):
        for part in "qv":
            kernel = tensors[f"layers.{i}.attn.{part}.kernel"]
            thin = 0.1 * rng.standard_normal((kernel.shape[0], 2)) @ rng.standard_normal((2, kernel.shape[1]))
            changed[f"layers.{i}.attn.{part}.kernel"] = (kernel + thin).astype(np.float32)
    return changed


def fine_tuned(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    return {
        name: (array + 0.05 * array.std() * rng.standard_normal(array.shape)).astype(array.dtype)
        for name, array in tensors.items()
    }


def fresh(name: str, deviation: float) -> Fault:
    return lambda tensors, rng: {name: (deviation * rng.standard_normal(tensors[name].shape)).astype(np.float32)}


def quantised(array: np.ndarray, top: int = 127) -> np.ndarray:
    scale = np.abs(array).max(axis=1, keepdims=True) / top
    return (np.rint(array / scale) * scale).astype(np.float32)


def rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(jnp.bfloat16).astype(np.float32)


def elements(name: str, count: int) -> Fault:
    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        changed = tensors[name].copy()
        changed.ravel()[rng.choice(changed.size, count, replace=False)] *= -4
        return {name: changed}

    return fault


def with_rows(array: np.ndarray, first: int, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[first:] = value
    return changed


Q, K, OUT = "layers.0.attn.q.kernel", "layers.0.attn.k.kernel", "layers.1.attn.out.kernel"
UP, DOWN, EMBED = "layers.1.mlp.up.kernel", "layers.1.mlp.down.kernel", "embed.tokens.weight"
HEADS = [f"layers.{i}.attn" for i in range(3)]

CASES: dict[str, tuple[str, Fault, str, str, list[str]]] = {
    # name of the case: model, fault, cause, where it begins, where else
    "square kernel transposed": ("llama-square-biased-tied-linear", on(Q, np.transpose), "kernel transposed", Q, []),
    "kernel transposed": ("llama", on(UP, np.transpose), "kernel transposed", UP, []),
    "reshaped": ("gpt2", on(DOWN, lambda a: a.T.reshape(a.shape)), "reshaped instead of transposed", DOWN, []),
    "heads on their own axis": (
        "llama",
        on(Q, lambda a: a.reshape(42, 6, 14)),
        "another shape with the same values",
        Q,
        [],
    ),
    "qkv by heads": (
        "gpt2",
        packed(lambda n, h: np.arange(3 * n * h).reshape(n, 3, h).transpose(1, 0, 2).ravel()),
        "qkv packing order",
        Q,
        [f"{at}.{part}" for at in HEADS for part in "qkv"][1:],
    ),
    "qkv parts": (
        "gpt2",
        packed(lambda n, h: np.roll(np.arange(3 * n * h), n * h)),
        "qkv packing order",
        Q,
        [f"{at}.{part}" for at in HEADS for part in "qkv"][1:],
    ),
    "q and k": (
        SQUARE,
        exchange(*((f"layers.1.attn.k.{leaf}", f"layers.1.attn.v.{leaf}") for leaf in ("kernel", "bias"))),
        "query, key and value swapped",
        "layers.1.attn.k.kernel",
        ["layers.1.attn.v"],
    ),
    "gate and up": (
        "llama",
        exchange(*((f"layers.{i}.mlp.gate.kernel", f"layers.{i}.mlp.up.kernel") for i in range(3))),
        "gate and up swapped",
        "layers.0.mlp.gate.kernel",
        ["layers.0.mlp.up", *(f"layers.{i}.mlp.{name}" for i in (1, 2) for name in ("gate", "up"))],
    ),
    "norms": (
        "llama",
        exchange(("layers.2.attn_norm.weight", "layers.2.mlp_norm.weight")),
        "attention and MLP norms swapped",
        "layers.2.attn_norm.weight",
        ["layers.2.mlp_norm"],
    ),
    "q and out": (
        SQUARE,
        exchange((Q, "layers.0.attn.out.kernel")),
        "parameters of equal shape swapped",
        Q,
        ["layers.0.attn.out"],
    ),
    "tiled heads": (
        "llama",
        lambda tensors, rng: {
            name: heads_moved(tensors[name], [0, 3, 1, 4, 2, 5], axis)
            for at in HEADS
            for name, axis in ((f"{at}.q.kernel", 1), (f"{at}.out.kernel", 0))
        },
        "GQA repeat against tile",
        Q,
        ["layers.0.attn.out", *(f"layers.{i}.attn.{part}" for i in (1, 2) for part in ("q", "out"))],
    ),
    "heads permuted": ("llama", on(Q, lambda a: heads_moved(a, [2, 0, 1, 3, 5, 4], 1)), "heads permuted", Q, []),
    "kv heads exchanged": ("llama", on(K, lambda a: heads_moved(a, [1, 0], 1)), "heads permuted", K, []),
    "kv heads repeated": (
        "llama",
        on(K, lambda a: a.reshape(42, 2, 1, 14).repeat(3, axis=2).reshape(42, 84)),
        "key and value heads repeated",
        K,
        [],
    ),
    "Meta's rows": (
        SQUARE,
        lambda tensors, rng: {
            f"layers.{i}.attn.{part}.{leaf}": interleaved(tensors[f"layers.{i}.attn.{part}.{leaf}"], heads)
            for i in range(3)
            for part, heads in (("q", 6), ("k", 2))
            for leaf in ("kernel", "bias")
        },
        "rows permuted for interleaved RoPE",
        Q,
        ["layers.0.attn.k", *(f"layers.{i}.attn.{part}" for i in (1, 2) for part in "qk")],
    ),
    "columns permuted": (
        "gpt2",
        lambda t, rng: {UP: t[UP][:, rng.permutation(52)]},
        "rows or columns in another order",
        UP,
        [],
    ),
    "embedding rolled": ("gpt2", on(EMBED, lambda a: np.roll(a, 1, axis=0)), "embedding rows shifted", EMBED, []),
    "embedding overrun": (
        "gpt2",
        on(EMBED, lambda a: np.concatenate([a[:2], a[:-2]])),
        "embedding rows shifted",
        EMBED,
        [],
    ),
    "wrong offset": (
        "gpt2",
        on(UP, lambda a: np.concatenate([a.ravel()[5:], a.ravel()[:5] * 0.5]).reshape(a.shape)),
        "read from a wrong offset",
        UP,
        [],
    ),
    "layers reversed": (
        "gpt2-deep",
        layers(list(range(12))[::-1]),
        "layers in reversed order",
        "layers.0.attn_norm.weight",
        [],
    ),
    "layers by text": (
        "llama-deep",
        layers(sorted(range(12), key=str)),
        "layers in lexicographic order",
        "layers.2.attn_norm.weight",
        [],
    ),
    "layers by one": (
        "gpt2-deep",
        layers([*range(1, 12), 0]),
        "layers shifted by one",
        "layers.0.attn_norm.weight",
        [],
    ),
    "layers overrun": ("gpt2-deep", layers([0, *range(11)]), "layers shifted by one", "layers.1.attn_norm.weight", []),
    "two layers": (
        "gpt2-deep",
        layers([0, 5, *range(2, 5), 1, *range(6, 12)]),
        "layers swapped",
        "layers.1.attn_norm.weight",
        [],
    ),
    "three layers": (
        "gpt2-deep",
        layers([0, 5, 1, 3, 4, 2, *range(6, 12)]),
        "layers in another order",
        "layers.1.attn_norm.weight",
        [],
    ),
    "another tensor": (
        "gpt2",
        lambda tensors, rng: {UP: tensors["layers.2.mlp.up.kernel"]},
        "another parameter's tensor loaded",
        UP,
        [],
    ),
    "sign": ("gpt2", on("layers.1.attn.q.bias", np.negative), "sign flipped", "layers.1.attn.q.bias", []),
    "byte order": ("llama", on(OUT, lambda a: a.byteswap()), "byte order swapped", OUT, []),
    "fp32 through bf16 as fp16": (
        "llama",
        on(OUT, lambda a: a.astype(jnp.bfloat16).view(np.float16).astype(np.float32)),
        "bf16 bits read as fp16",
        OUT,
        [],
    ),
    "norm minus one": (
        "llama",
        lambda tensors, rng: {name: array - 1 for name, array in tensors.items() if name.endswith("norm.weight")},
        "(1+w) norm handling",
        "layers.0.attn_norm.weight",
        ["layers.0.mlp_norm", *(f"layers.{i}.{kind}_norm" for i in (1, 2) for kind in ("attn", "mlp")), "final_norm"],
    ),
    "norm plus one": (
        "llama",
        on("final_norm.weight", lambda a: a + 1),
        "(1+w) norm handling",
        "final_norm.weight",
        [],
    ),
    "rounded": ("gpt2", on(DOWN, lambda a: rounded(a)), "values rounded to bfloat16", DOWN, []),
    "stored narrower": ("gpt2", on(DOWN, lambda a: a.astype(np.float16)), "values rounded to float16", DOWN, []),
    "truncated": (
        "gpt2",
        on(DOWN, lambda a: (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)),
        "values truncated to bfloat16",
        DOWN,
        [],
    ),
    "TF32": (
        "gpt2",
        on(DOWN, lambda a: (a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)),
        "values rounded to fewer bits",
        DOWN,
        [],
    ),
    "bias zero": ("gpt2", on("layers.1.mlp.up.bias", np.zeros_like), "bias dropped", "layers.1.mlp.up.bias", []),
    "zeros": ("gpt2", on(UP, np.zeros_like), "tensor of zeros", UP, []),
    "norm of ones": (
        "gpt2",
        on("final_norm.weight", np.ones_like),
        "tensor left at its random init",
        "final_norm.weight",
        [],
    ),
    "norm folded": (
        "llama",
        folded,
        "norm weights folded into the next projection",
        "layers.1.mlp_norm.weight",
        ["layers.1.mlp.gate", "layers.1.mlp.up"],
    ),
    "one NaN": ("gpt2", on(UP, lambda a: with_rows(a, len(a) - 1, np.nan)), "NaN or infinite values", UP, []),
    "three elements": ("gpt2", elements(UP, 3), "a few elements corrupted", UP, []),
    "a column of zeros": ("gpt2", on(UP, lambda a: a * (np.arange(52) != 7)), "some elements zeroed", UP, []),
    "scaled": ("gpt2", on(OUT, lambda a: a * np.float32(0.3)), "tensor scaled by a constant", OUT, []),
    "int8": ("llama", on(UP, quantised), "weight dequantised from int8 or int4", UP, []),
    "int4": ("llama", on(UP, lambda a: quantised(a, 7)), "weight dequantised from int8 or int4", UP, []),
    "adapter": (
        "llama",
        adapter,
        "a low-rank change, such as a merged adapter",
        Q,
        ["layers.0.attn.v", *(f"layers.{i}.attn.{part}" for i in (1, 2) for part in "qv")],
    ),
    "random init": ("llama", fresh(UP, 0.02), "tensor left at its random init", UP, []),
    "random head": ("llama", fresh("head.weight", 0.02), "lm_head untied and random", "head.weight", []),
    "embedding as head": (
        "llama",
        lambda tensors, rng: {"head.weight": tensors[EMBED]},
        "lm_head wrongly tied",
        "head.weight",
        [],
    ),
    "live padding": (
        "llama",
        on("head.weight", lambda a: with_rows(a, 120, 0.3 * a[:11])),
        "padded vocabulary rows live",
        "head.weight",
        [],
    ),
    "rows lost": ("llama", on(EMBED, lambda a: with_rows(a, 100, 0)), "rows truncated", EMBED, []),
}

ODD: dict[str, Fault] = {
    "noise in one tensor": lambda t, rng: {UP: (t[UP] + 0.01 * rng.standard_normal(t[UP].shape)).astype(np.float32)},
    "one row of another model": lambda t, rng: {UP: with_rows(t[UP], len(t[UP]) - 1, rng.standard_normal(52))},
    "absolute values": on(UP, np.abs),
    "squared": on(UP, np.square),
    "clipped everywhere": on_all(lambda a: np.clip(a, a.mean() - a.std(), a.mean() + a.std())),
    "in another basis": lambda t, rng: {
        UP: (np.linalg.qr(rng.standard_normal((36, 36)))[0] @ t[UP]).astype(np.float32)
    },
    "elements shuffled": lambda t, rng: {UP: rng.permutation(t[UP].ravel()).reshape(t[UP].shape)},
    "half of the elements negated": on(UP, lambda a: a * np.where(np.arange(a.size).reshape(a.shape) % 2, 1, -1)),
    "columns centred": on(UP, lambda a: a - a.mean(axis=0)),
    "a bias of noise": lambda t, rng: {"final_norm.bias": rng.standard_normal(36).astype(np.float32)},
    "heavy tails": lambda t, rng: {UP: (0.02 * rng.standard_t(2, t[UP].shape)).astype(np.float32)},
    "tensor of one value": on(UP, lambda a: np.full_like(a, 0.1)),
    "rows scaled apart": on(UP, lambda a: a * np.linspace(0.5, 2, 36, dtype=np.float32)[:, None]),
}
"""Faults that no repair undoes."""
