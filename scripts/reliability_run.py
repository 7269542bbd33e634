"""The tiny training run on which the reliability scripts try kills, full disks and signals."""

import json
from pathlib import Path
from typing import Any

from jaxgpt.data.encode import encode
from jaxgpt.tokenizer import Tokenizer

MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
"""8,304 parameters with the vocabulary below."""


def encode_text(out: Path) -> Path:
    """Shards of a text that is the same each time, a fifth of it held out."""
    texts = [f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n" * 4 for i in range(60)]
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encode(source, out, Tokenizer.create("char", template=None, corpus=texts), val_fraction=0.2)
    return out


def words(out: Path, data: Path | None = None, *settings: Any, resume: bool = False, **model: int) -> list[str]:
    """Arguments of `jaxgpt` that train into `out`, or go on with the run there."""
    if resume:
        return ["pretrain", "--out", str(out), "--resume"]
    sizes = {**MODEL, **model}
    given = ["--preset", "llama-tiny", "--batch-size", 2, "--sequence-length", 16, "--eval-batches", 2]
    flags = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", size)]
    chosen = [*given, *flags, "--warmup-steps", 2, "--dropout", 0.1, *settings]
    return ["pretrain", "--data", str(data), "--out", str(out), *map(str, chosen)]
