"""ckpt.pt of nanoGPT, tiny."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 20, "vocab_size": 37, "dropout": 0.0}


def nano_state(*, bias: bool, seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    """Parameters as nanoGPT's `GPT` names and lays them out: Linear (out, in), biases only where asked for."""
    torch.manual_seed(seed)
    width = SIZES["n_embd"]
    state: OrderedDict[str, torch.Tensor] = OrderedDict()

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        state[f"{name}.weight"] = mean + 0.3 * torch.randn(shape)
        if bias and not name.endswith(("wte", "wpe")):
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0])

    add("transformer.wte", SIZES["vocab_size"], width)
    add("transformer.wpe", SIZES["block_size"], width)
    for i in range(SIZES["n_layer"]):
        add(f"transformer.h.{i}.ln_1", width, mean=1.0)
        add(f"transformer.h.{i}.attn.c_attn", 3 * width, width)
        add(f"transformer.h.{i}.attn.c_proj", width, width)
        add(f"transformer.h.{i}.ln_2", width, mean=1.0)
        add(f"transformer.h.{i}.mlp.c_fc", 4 * width, width)
        add(f"transformer.h.{i}.mlp.c_proj", width, 4 * width)
    add("transformer.ln_f", width, mean=1.0)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nano_file(path: Path, state: Any, **changes: Any) -> Path:
    """ckpt.pt as nanoGPT's train.py saves it."""
    content = {
        "model": state,
        "optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict(),
        "model_args": SIZES | {"bias": False},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.25),
        "config": {"out_dir": "out", "n_head": 999, "learning_rate": 6e-4},
    }
    torch.save(content | changes, path)
    return path
