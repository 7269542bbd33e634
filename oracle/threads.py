"""How many threads torch computes with."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from jaxgpt.config import ModelConfig
from oracle import training_probe


@contextmanager
def fitting(config: ModelConfig) -> Generator[None, None, None]:
    """Torch's own number for a large model, one for a small one.

    Ops of a small model are so short that more threads would mostly wait for each other, on a busy machine for
    longer than the work takes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if training_probe.is_large(config) else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
