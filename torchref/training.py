"""Training by its definitions: rows and batches, loss, gradients, clipping, schedules, AdamW.

Everything starts from plain lists of ids. Nothing here knows the program under test;
what it must agree with are the papers named at each function.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.adamw import adamw

from torchref.decoder import Decoder
from torchref.ops import wide

# -- Rows and batches ------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Places of one row, without padding; lists of equal length."""

    ids: list[int]
    targets: list[int]
    """What each place should predict; 0 where it is not trained."""
    mask: list[int]
    """1 where the loss counts."""
    positions: list[int]
    segments: list[int]
    """Documents of the row, counted from 1."""


def windows(documents: Sequence[Sequence[int]], length: int) -> list[Row]:
    """The documents one behind the other, cut into rows of `length` places.

    A token is predicted from the tokens of its own document before it in the row, so
    the first of a document is no target. The last token of all predicts nothing and
    gets no row of its own.
    """
    stream = [(token, number) for number, tokens in enumerate(documents) for token in tokens]
    return [_window(stream, start, length) for start in range(0, max(1, len(stream) - 1), length)]


def _window(stream: list[tuple[int, int]], start: int, length: int) -> Row:
    row = Row([], [], [], [], [])
    here, behind = stream[start : start + length], stream[start + 1 : start + length + 1]
    for place, (token, document) in enumerate(here):
        begins = place == 0 or here[place - 1][1] != document
        trained = place < len(behind) and behind[place][1] == document
        row.ids.append(token)
        row.targets.append(behind[place][0] if trained else 0)
        row.mask.append(int(trained))
        row.positions.append(0 if begins else row.positions[-1] + 1)
        row.segments.append(row.segments[-1] + int(begins) if place else 1)
    return row


Episode = tuple[Sequence[int], Sequence[int]]
"""Ids of a conversation, and 1 for each that is trained, 0 for each that is only read."""


def packed(episodes: Sequence[Episode], length: int) -> list[Row]:
    """Episodes in rows of at most `length` places: each into the first row with room for it, in the order given.

    An episode of L tokens takes L − 1 places, because its last token predicts nothing.
    """
    rows: list[Row] = []
    for ids, trained in episodes:
        room = (row for row in rows if len(row.ids) + len(ids) - 1 <= length)
        row = next(room, None)
        if row is None:
            row = Row([], [], [], [], [])
            rows.append(row)
        _append(row, ids, trained)
    return rows


def _append(row: Row, ids: Sequence[int], trained: Sequence[int]) -> None:
    segment = row.segments[-1] + 1 if row.segments else 1
    for place in range(len(ids) - 1):
        counts = int(trained[place + 1] != 0)
        row.ids.append(ids[place])
        row.targets.append(ids[place + 1] * counts)
        row.mask.append(counts)
        row.positions.append(place)
        row.segments.append(segment)


@dataclass(frozen=True)
class Batch:
    """Rows of equal width, padded with zeros; segment 0 is padding."""

    ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    segments: Int[Tensor, "B T"]

    @property
    def trained(self) -> int:
        """Targets that count."""
        return int(self.mask.sum())


def batches(rows: Sequence[Row], length: int, size: int) -> list[Batch]:
    """`size` rows at a time, in order; the last batch is filled up with rows of padding."""
    return [_batch(rows[start : start + size], length, size) for start in range(0, len(rows), size)]


def _batch(rows: Sequence[Row], length: int, size: int) -> Batch:
    def padded(name: str) -> Tensor:
        lists: list[list[int]] = [getattr(row, name) for row in rows]
        lists += [[]] * (size - len(rows))
        return torch.tensor([values + [0] * (length - len(values)) for values in lists])

    return Batch(padded("ids"), padded("targets"), padded("mask"), padded("positions"), padded("segments"))


# -- Loss and gradients ----------------------------------------------------------------


def token_losses(model: Decoder, batch: Batch) -> Float[Tensor, "B T"]:
    """−log p(target) of every place, in nats, trained or not."""
    logits = model(batch.ids, positions=batch.positions, segments=batch.segments)
    return -torch.log_softmax(logits, dim=-1).gather(-1, batch.targets[..., None])[..., 0]


def _share(model: Decoder, batch: Batch, trained: int) -> Tensor:
    """What one micro-batch adds to the mean loss of all trained tokens of its step."""
    return (token_losses(model, batch) * batch.mask).sum() / max(trained, 1)


Gradients = dict[str, Tensor]
"""By the parameter's name; float32 at least."""


def gradients(model: Decoder, micro_batches: Sequence[Batch]) -> tuple[float, Gradients]:
    """Mean loss a trained token over all micro-batches, and its gradient.

    Summed losses are divided once, by the trained tokens of the whole step, so that it
    does not matter how a step is divided into micro-batches.
    """
    trained = sum(batch.trained for batch in micro_batches)
    names, parameters = zip(*model.named_parameters(), strict=True)
    total, sums = 0.0, [torch.zeros_like(wide(parameter)) for parameter in parameters]
    for batch in micro_batches:
        share = _share(model, batch, trained)
        for sum_, part in zip(sums, torch.autograd.grad(share, parameters), strict=True):
            sum_ += part
        total += float(share.detach())
    return total, dict(zip(names, sums, strict=True))


def gradients_one_by_one(model: Decoder, batch: Batch, take: Callable[[str, Tensor], None]) -> float:
    """The same for one micro-batch, without holding all gradients: `take(name, gradient)` gets each as it is done.

    The order is that of backpropagation. Returns the mean loss.
    """

    def done(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        take(name, wide(parameter.grad))
        parameter.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(done, name))
        for name, parameter in model.named_parameters()
    ]
    try:
        loss = _share(model, batch, batch.trained)
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return float(loss.detach())


# -- Optimizer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to optimize."""

    steps: int
    learning_rate: float
    """The highest."""
    schedule: str
    """`cosine` (Loshchilov & Hutter 2017), `wsd` (Hu et al. 2024) or `constant`."""
    warmup_steps: int
    decay_fraction: float
    """Share of the steps in which wsd decays."""
    final_learning_rate: float
    """At the last step, as a share of the highest."""
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float
    epsilon: float = 1e-8


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step, counted from 0.

    Step k of w warm-up steps has (k + 1) / (w + 1) of the highest rate, step w all of
    it; from the beginning of the decay to the last step it falls to the final rate.
    """
    last = max(recipe.steps - 1, 1)
    warmup = min(recipe.warmup_steps, last)
    highest, lowest = recipe.learning_rate, recipe.learning_rate * recipe.final_learning_rate
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return highest
    falling = max(last - warmup, 1)
    if recipe.schedule == "wsd":
        falling = min(falling, max(1, round(recipe.decay_fraction * recipe.steps)))
    past = min(1.0, max(0.0, 1 - (last - step) / falling))
    left = 0.5 + 0.5 * math.cos(math.pi * past) if recipe.schedule == "cosine" else 1 - past
    return lowest + (highest - lowest) * left


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """Of all gradients as one vector."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def clipped(gradients: Mapping[str, Tensor], norm: float, limit: float) -> Gradients:
    """Scaled down to the global norm `limit` where they are longer (Pascanu et al. 2013, algorithm 1).

    `torch.nn.utils.clip_grad_norm_` divides by norm + 1e-6, which the paper does not.
    """
    factor = limit / norm if norm >= limit else 1.0
    return {name: gradient * factor for name, gradient in gradients.items()}


@dataclass(frozen=True)
class Report:
    """What one step says of itself."""

    loss: float
    """Nats a trained token, before the step."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float


class Trainer:
    """Optimizes a model in place with AdamW (Loshchilov & Hutter 2019); matrices decay, norms and biases do not.

    `torch.optim.adamw` multiplies the decay with the learning rate, as optax does and
    the paper does not; both add epsilon outside the root of the bias-corrected moment
    (Kingma & Ba 2015, algorithm 1). The function rather than the class `AdamW`, which
    computes the same but loads PyTorch's compiler at its first use, for seconds.
    """

    def __init__(self, model: Decoder, recipe: Recipe):
        self.model, self.recipe, self.steps = model, recipe, 0
        self.first_moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.second_moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def step(self, micro_batches: Sequence[Batch]) -> Report:
        """One update from all micro-batches."""
        loss, unclipped = gradients(self.model, micro_batches)
        norm = global_norm(unclipped)
        rate = learning_rate(self.recipe, self.steps)
        self._update(clipped(unclipped, norm, self.recipe.clip_norm), rate)
        self.steps += 1
        return Report(loss, norm, rate)

    @torch.no_grad()
    def _update(self, gradients: Gradients, rate: float) -> None:
        for name, parameter in self.model.named_parameters():
            adamw(
                [parameter],
                [gradients[name]],
                [self.first_moments[name]],
                [self.second_moments[name]],
                [],
                [torch.tensor(float(self.steps))],
                amsgrad=False,
                beta1=self.recipe.beta1,
                beta2=self.recipe.beta2,
                lr=rate,
                weight_decay=self.recipe.weight_decay if parameter.dim() > 1 else 0.0,
                eps=self.recipe.epsilon,
                maximize=False,
            )

    def divisors(self) -> dict[str, Tensor]:
        """What the last step divided each parameter's first moment by: √v̂ + ε."""
        correction = 1 - self.recipe.beta2**self.steps
        return {
            name: (moment / correction).sqrt() + self.recipe.epsilon for name, moment in self.second_moments.items()
        }
