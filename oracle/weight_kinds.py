"""What kinds of weights clean models have: random ones, trained ones, and random ones of unusual scale.

Noise depends on the numbers. Random weights leave attention flat and activations in
their middle; training makes attention sharp and activations saturate, real models
have a few channels far larger than the rest, and scales shift all of it.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

import torchref
from torchref import Decoder

Config = Mapping[str, Any]
"""The content of a config.json."""
Tensors = dict[str, Tensor]
"""float32, by Hugging Face's names."""

EMBEDDINGS = ("wte", "wpe", "embed_tokens")
INTO_STREAM = ("attn.c_proj", "mlp.c_proj", "o_proj", "down_proj")
"""Modules whose output is added to the residual stream."""
LOUD, QUIET = 3.0, 0.1
OUTLIERS, OUTLIER_SCALE = 2, 50.0
STEPS, ROWS, TIME = 150, 12, 48
"""Of a brief training."""
LEARNING_RATE = 1e-2
ADAMW: dict[str, Any] = {
    "amsgrad": False,
    "beta1": 0.9,
    "beta2": 0.999,
    "lr": LEARNING_RATE,
    "weight_decay": 0.01,
    "eps": 1e-8,
    "maximize": False,
}
"""Those of the class `AdamW`, which computes the same but loads PyTorch's compiler at its first use, for seconds."""


def draw(config: Config, seed: int, kind: str = "random") -> Tensors:
    """All tensors of a model, a tied head among them.

    Args:
        config: the content of a config.json.
        seed: of everything drawn.
        kind: a key of `KINDS`.
    """
    return KINDS[kind](config, seed)


def random(config: Config, seed: int) -> Tensors:
    """Values of realistic scale in which nothing is zero, one or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, tensor, generator) for name, tensor in _model(config, seed).state_dict().items()}


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("bias"):
        return 0.2 * noise
    if like.ndim == 1:
        return 1.0 + 0.3 * noise
    if any(part in name for part in EMBEDDINGS):
        return 0.3 * noise
    return noise * max(like.shape) ** -0.5


def _scaled(factor: float) -> Callable[[Config, int], Tensors]:
    def scaled(config: Config, seed: int) -> Tensors:
        """Random weights, every matrix multiplied by a factor."""
        return {name: t * factor if t.ndim == 2 else t for name, t in random(config, seed).items()}

    return scaled


def outlier(config: Config, seed: int) -> Tensors:
    """Random weights with a few channels of the residual stream far larger than the others.

    Dettmers et al. 2022 (LLM.int8) found such channels in every large model.
    """
    tensors = random(config, seed)
    generator = torch.Generator().manual_seed(seed)
    width = next(t.shape[-1] for name, t in tensors.items() if any(part in name for part in EMBEDDINGS))
    channels = torch.randperm(width, generator=generator)[:OUTLIERS]
    for name, tensor in tensors.items():
        if any(part in name for part in EMBEDDINGS) or (writes(name) and (tensor.ndim == 1 or _is_conv1d(name))):
            tensor[..., channels] *= OUTLIER_SCALE
        elif writes(name):
            tensor[channels] *= OUTLIER_SCALE
    return tensors


def writes(name: str) -> bool:
    """The module of this parameter adds to the residual stream."""
    return any(part in name for part in INTO_STREAM)


def _is_conv1d(name: str) -> bool:
    return "c_proj" in name  # GPT-2's matrices are (in, out)


@lru_cache(maxsize=8)
def _trained(config: tuple[tuple[str, Any], ...], seed: int) -> Tensors:
    model = _model(_thawed(config), seed)
    parameters: list[Tensor] = list(model.parameters())
    moments = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    steps = [torch.tensor(0.0) for _ in parameters]
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(STEPS):
            ids = language(model.vocab_size, ROWS, _time(model), generator)
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            gradients = list(torch.autograd.grad(loss, parameters))
            with torch.no_grad():
                adamw(parameters, gradients, *moments, [], steps, **ADAMW)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(config: Config, seed: int) -> Tensors:
    """From the usual initialisation through a brief training in torch on `language`."""
    return dict(_trained(_frozen(config), seed))


def _time(model: Decoder) -> int:
    return min(TIME, (model.positions_limit or TIME) - 1)


def language(vocabulary: int, rows: int, time: int, generator: torch.Generator) -> Tensor:
    """(rows, time + 1) ids: even rows follow a rule from token to token with gaps, odd ones repeat a phrase."""
    drawn = torch.randint(vocabulary, (rows, time + 1), generator=generator)
    for at in range(1, time + 1):
        kept = torch.rand(rows // 2, generator=generator) < 0.8
        drawn[::2, at][: len(kept)] = torch.where(kept, (drawn[::2, at - 1] * 5 + 3) % vocabulary, drawn[::2, at])
    phrase = max(1, time // 5)
    drawn[1::2] = drawn[1::2, :phrase].repeat(1, time // phrase + 2)[:, : time + 1]
    return drawn


def _model(config: Config, seed: int) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torchref.build(config)


def _frozen(config: Config) -> tuple[tuple[str, Any], ...]:
    return tuple((key, _frozen(value) if isinstance(value, Mapping) else value) for key, value in config.items())


def _thawed(frozen: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {key: _thawed(value) if isinstance(value, tuple) else value for key, value in frozen}


KINDS: Mapping[str, Callable[[Config, int], Tensors]] = {
    "random": random,
    "trained": trained,
    "loud": _scaled(LOUD),
    "quiet": _scaled(QUIET),
    "outlier": outlier,
}
"""By the name that a calibration lists."""
