"""The model's parameters as a Flax NNX module, which defines and initialises them.

A file of its own: whoever only loads weights need not wait until Flax is imported.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt import model, weights
from jaxgpt.config import ModelConfig


class Module(nnx.Module):
    """Parameters of one op or a group of them, initialised as GPT-2's: normal, ones, zeros."""

    def add(self, name: str, shape: tuple[int, ...], scale: float, rngs: nnx.Rngs) -> None:
        """Define the parameter `name`, below this module."""
        head, _, rest = name.partition(".")
        if rest:
            if not hasattr(self, head):
                setattr(self, head, Module())
            getattr(self, head).add(rest, shape, scale, rngs)
        elif head == "bias":
            self.bias = nnx.Param(jnp.zeros(shape))
        elif len(shape) == 1:
            self.weight = nnx.Param(jnp.ones(shape))
        else:
            setattr(self, head, nnx.Param(scale * jax.random.normal(rngs.params(), shape)))


class Transformer(Module):
    """The model as a Flax NNX module: `Transformer(config, nnx.Rngs(0))(ids)` gives logits.

    Its parameters are those of the name table, in float32. The rest of jaxgpt uses
    it to define and initialise them and then works on the flat dict of `params`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        for parameter in weights.parameters(config):
            self.add(parameter.name, parameter.shape, _initial_scale(config, parameter.name), rngs)

    def params(self) -> dict[str, Array]:
        """Flat parameters under the table's names."""
        flat = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {".".join(map(str, path)): variable[...] for path, variable in flat}

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of whole sequences, dropout off."""
        return model.forward(self.config, self.params(), ids).logits


def _initial_scale(config: ModelConfig, name: str) -> float:
    # Each of the 2L residual branches adds variance to the stream (GPT-2 report, section 2.3).
    ends_branch = name.endswith(("attn.out.kernel", "mlp.down.kernel"))
    return config.initializer_range * ((2 * config.num_hidden_layers) ** -0.5 if ends_branch else 1.0)


def init(config: ModelConfig, seed: int, placed: Mapping[str, Any] | None = None) -> dict[str, Array]:
    """Fresh float32 parameters, the same wherever their shardings (`placed`) put them."""
    return jax.jit(lambda: Transformer(config, nnx.Rngs(seed)).params(), out_shardings=placed)()
