"""The MLP-Mixer of torch_trace.py in Flax NNX, recorded; the side in doubt.

Needs flax, and no torch. `--bug` forgets that `jax.nn.gelu` is the tanh approximation
unless it is told otherwise, in the MLPs that mix channels.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from oracle import traces

SIZE, PATCH, PATCHES, WIDTH, TOKENS, CHANNELS, LAYERS, CLASSES = 20, 4, 25, 24, 18, 40, 3, 7


class Mlp(nnx.Module):
    """Two linear maps and a GELU."""

    def __init__(self, width: int, hidden: int, approximate: bool, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x: jax.Array) -> jax.Array:
        """The last axis is mixed."""
        return self.down(jax.nn.gelu(self.up(x), approximate=self.approximate))


class Block(nnx.Module):
    """Mixes the patches of each channel, then the channels of each patch."""

    def __init__(self, bug: bool, rngs: nnx.Rngs):
        self.token_norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.tokens = Mlp(PATCHES, TOKENS, approximate=False, rngs=rngs)
        self.channel_norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.channels = Mlp(WIDTH, CHANNELS, approximate=bug, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, patches, width)."""
        x = x + self.tokens(self.token_norm(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.channel_norm(x))


class Mixer(nnx.Module):
    """Images to class scores."""

    def __init__(self, bug: bool, rngs: nnx.Rngs):
        self.embed = nnx.Conv(3, WIDTH, (PATCH, PATCH), strides=PATCH, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([Block(bug, rngs) for _ in range(LAYERS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, height, width, 3) to (B, classes)."""
        x = self.embed(images)
        x = x.reshape(len(x), PATCHES, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def load(model: Mixer, weights: dict[str, np.ndarray]) -> None:
    """Torch's weights into the Flax model: Linear is (out, in) there, a convolution (out, in, height, width)."""

    def linear(layer: nnx.Linear | nnx.Conv, name: str) -> None:
        kernel = weights[f"{name}.weight"]
        layer.kernel[...] = jnp.asarray(kernel.T if kernel.ndim == 2 else kernel.transpose(2, 3, 1, 0))
        layer.bias[...] = jnp.asarray(weights[f"{name}.bias"])

    def norm(layer: nnx.LayerNorm, name: str) -> None:
        layer.scale[...] = jnp.asarray(weights[f"{name}.weight"])
        layer.bias[...] = jnp.asarray(weights[f"{name}.bias"])

    linear(model.embed, "stem")
    for i, block in enumerate(model.blocks):
        norm(block.token_norm, f"layers.{i}.norm1")
        norm(block.channel_norm, f"layers.{i}.norm2")
        for mlp, name in ((block.tokens, "token_mlp"), (block.channels, "channel_mlp")):
            linear(mlp.up, f"layers.{i}.{name}.fc1")
            linear(mlp.down, f"layers.{i}.{name}.fc2")
    norm(model.norm, "norm")
    linear(model.head, "head")


def main() -> None:
    """Load and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="what torch_trace.py stored")
    parser.add_argument("--out", type=Path, required=True, help="the trace to write")
    parser.add_argument("--bug", action="store_true", help="the wrong GELU where channels are mixed")
    arguments = parser.parse_args()
    model = Mixer(arguments.bug, nnx.Rngs(0))
    load(model, load_file(arguments.weights))
    images = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    traces.save(traces.record_flax(model, jnp.asarray(images.transpose(0, 2, 3, 1))), arguments.out)


if __name__ == "__main__":
    main()
