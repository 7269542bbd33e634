"""Checks before, at and after the first step that stop a run which could only be wrong.

A model that knows nothing scores ln(V) nats a token. Above that it is worse than a
guess (damaged weights, another vocabulary); far below it at the first step, a fresh
model has seen its answers; far above it later, training makes it worse.
"""

import math
from collections.abc import Sequence

import numpy as np
from jax.errors import JaxRuntimeError

from jaxgpt import model, processes
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.checks.golden import golden_prompts_test
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, empty_batch
from jaxgpt.errors import InputError
from jaxgpt.lm import LM
from jaxgpt.loss import evaluate
from jaxgpt.mesh import ALONE, Layout
from jaxgpt.step_folder import GOLDEN

FRESH_ABOVE = 0.3
FRESH_BELOW = 1.0
"""How far the first real batch of a fresh model may lie from ln(V)."""
LOADED_SHARE = 0.84
"""A loaded model should score below this share of ln(V): 10.0 nats for Qwen2's vocabulary."""

DIVERGED = 2.0
"""Multiple of ln(V), or of the first loss where that was more, that no run reaches which learns."""
DIVERGED_STEPS = 3
"""In a row: a single batch may be that strange."""


def uniform(config: ModelConfig) -> float:
    """ln(V): the loss of a uniform guess, in nats."""
    return math.log(config.vocab_size)


def random_batch(config: ModelConfig, rows: int, time: int) -> Batch:
    """Uniformly random ids with random targets: nothing to learn, nothing to know."""
    rng = np.random.default_rng(0)
    batch = empty_batch(rows, time)
    batch["ids"][:] = rng.integers(0, config.vocab_size, (rows, time))
    batch["targets"][:] = rng.integers(0, config.vocab_size, (rows, time))
    batch["mask"][:] = 1.0
    batch["segments"][:] = 1
    batch["positions"][:] = np.arange(time)
    return batch


def check_fresh(config: ModelConfig, params: model.Params, dtype: str, layout: Layout = ALONE) -> float:
    """Loss of a fresh model on random ids; raises InputError unless it is within 0.3 of ln(V)."""
    time = min(config.max_position_embeddings, 128)
    loss = evaluate(config, params, [random_batch(config, 8, time)], dtype, layout)
    if not abs(loss - uniform(config)) <= FRESH_ABOVE:
        raise InputError(
            f"a fresh model scores {loss:.3f} on random ids, expected {uniform(config):.3f} ± {FRESH_ABOVE} "
            "(ln(vocab)); check initializer_range"
        )
    return loss


def check_first_batch(config: ModelConfig, loss: float) -> None:
    """Refuse a fresh model's first training loss far from ln(V)."""
    expected = uniform(config)
    if not expected - FRESH_BELOW <= loss <= expected + FRESH_ABOVE:
        raise InputError(
            f"first loss is {loss:.3f}, expected between {expected - FRESH_BELOW:.3f} and {expected + FRESH_ABOVE:.3f} "
            f"(ln(vocab) = {expected:.3f}) for a fresh model; check the targets and the loss mask"
        )


def check_answers(source: Checkpoint, *, accept: bool) -> list[str]:
    """Refuse, unless accepted, a checkpoint that answers its golden prompts otherwise than rounding explains.

    A damaged layer may cost so little loss that `check_loaded` lets it pass. Lines to print where the
    prompts could not be asked, as of a model that one device cannot hold.

    Raises:
        InputError: with the first answer that differs, and what to run next.
    """
    cause, notices = "its golden prompts: see the first process", list[str]()
    refused = False
    if processes.first() and not accept and (source.path / GOLDEN).is_file():
        try:
            line = golden_prompts_test(LM(source), source.path, bits=False)
            refused, cause = line.status == "FAIL", line.detail
        except InputError as error:
            refused, cause = True, str(error)
        except (JaxRuntimeError, MemoryError) as error:
            notices = [f"golden prompts were not asked: {' '.join(str(error).split())[:200]}"]
    if processes.any_of(refused):
        raise InputError(
            f"{source.path} does not answer as its {GOLDEN} says: {cause}; `jaxgpt check` and `python -m oracle "
            "compare` tell more, --accept-loss trains it nonetheless"
        )
    return notices


def check_loaded(config: ModelConfig, loss: float, *, accept: bool) -> None:
    """Refuse a loaded model that predicts no better than a guess, or hardly better unless accepted.

    Raises:
        InputError: with the loss, the bound, and what to run next.
    """
    expected = uniform(config)
    if not loss <= expected:
        raise InputError(
            f"the loaded model scores {loss:.3f} before any update, worse than a uniform guess (ln(vocab) = "
            f"{expected:.3f}): the weights or the tokenizer are wrong; run `python -m oracle compare` on the checkpoint"
        )
    if loss > LOADED_SHARE * expected and not accept:
        raise InputError(
            f"the loaded model scores {loss:.3f} before any update, above {LOADED_SHARE * expected:.3f} "
            f"({LOADED_SHARE} ln(vocab)); check data and tokenizer, or pass --accept-loss"
        )


def known_targets(batches: Sequence[Batch], new_ids: Sequence[int]) -> list[Batch]:
    """The batches with all that a base model can know as targets: prompts too, the ids new to it not.

    Chat rows train answers only, and one-digit answers alone surprise a healthy base
    model by more than ln(V).
    """
    known: list[Batch] = []
    for batch in batches:
        changed = batch.copy()
        ids, segments = batch["ids"], batch["segments"]
        inner = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        changed["targets"], mask = batch["targets"].copy(), batch["mask"].copy()
        changed["targets"][:, :-1][inner] = ids[:, 1:][inner]
        mask[:, :-1][inner] = 1
        changed["mask"] = mask * ~np.isin(changed["targets"], list(new_ids))
        known.append(changed)
    return known


class Divergence:
    """The losses of a run, watched for updates that destroy what they should teach."""

    def __init__(self, config: ModelConfig, learning_rate: float):
        self.expected = uniform(config)
        self.learning_rate = learning_rate
        self.bound: float | None = None
        self.above = 0
        """Steps in a row."""

    def watch(self, step: int, loss: float) -> None:
        """The loss of one more step, in nats; raises InputError at the third in a row that no learning run has."""
        if self.bound is None:
            self.bound = DIVERGED * max(self.expected, loss)
        self.above = self.above + 1 if loss > self.bound else 0
        if self.above >= DIVERGED_STEPS:
            raise InputError(
                f"loss {loss:.4g} at step {step}, {DIVERGED_STEPS} steps in a row above {self.bound:.4g} "
                f"({DIVERGED:g} times a guess or the first loss; ln(vocab) = {self.expected:.3f}): the run diverges; "
                f"lower --learning-rate (it was {self.learning_rate:g})"
            )
