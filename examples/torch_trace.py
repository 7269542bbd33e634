"""An MLP-Mixer in PyTorch (Tolstikhin et al. 2021, figure 1), recorded; the right side of the example.

Needs torch, and no JAX. It draws its weights, stores them for the Flax side, and
writes a trace of one forward.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oracle import traces

SIZE, PATCH, PATCHES, WIDTH, TOKENS, CHANNELS, LAYERS, CLASSES = 20, 4, 25, 24, 18, 40, 3, 7


class Mlp(nn.Module):
    """Two linear maps and a GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """The last axis is mixed."""
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch."""

    def __init__(self):
        super().__init__()
        self.norm1, self.token_mlp = nn.LayerNorm(WIDTH), Mlp(PATCHES, TOKENS)
        self.norm2, self.channel_mlp = nn.LayerNorm(WIDTH), Mlp(WIDTH, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, width)."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """Images to class scores."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, classes)."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))


def main() -> None:
    """Draw, store and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="where the weights are stored")
    parser.add_argument("--out", type=Path, required=True, help="the trace to write")
    parser.add_argument("--float64", action="store_true", help="compute in float64: a truth for `oracle diff --truth`")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Mixer().eval()
    save_file(model.state_dict(), arguments.weights)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32))
    if arguments.float64:
        model, images = model.double(), images.double()
    traces.save(traces.record_torch(model, images), arguments.out)


if __name__ == "__main__":
    main()
