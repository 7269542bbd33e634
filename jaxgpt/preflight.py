"""What a training run will take, known before its first step: memory, data, first loss, time.

The step is compiled ahead of time, with the shapes it will have, and XLA then says
what it needs beside its arguments (`Compiled.memory_analysis`; filled in alike by the
CPU's and the GPU's compiler). A later call of `train_step` with the same shapes takes
that very program from JAX's cache: nothing is compiled twice.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import device, device_memory, flops, gates, out_of_memory, processes, run_log
from jaxgpt.array_files import in_bytes
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, Batches, empty_batch
from jaxgpt.errors import InputError
from jaxgpt.loss import evaluate
from jaxgpt.mesh import ALONE, Layout
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import TrainState, stacked, train_step

CHINCHILLA = 20
"""Training tokens a parameter at which compute is spent best (Hoffmann et al. 2022)."""
LEAST_BYTES = 20
"""A parameter, in float32: as loaded, as trained, AdamW's two moments, the gradient."""
ROWS, COLUMNS = 4, 64
"""How much of the first batch's mask is drawn."""
LONG_STEP = 10.0
"""Seconds of a first step after which a dry run does not take another."""


@dataclass(frozen=True)
class Preflight:
    """What a run would take. Sizes in bytes, times in seconds, losses in nats a token."""

    device: str
    """Several with their number and mesh."""
    compute_dtype: str
    parameters: int
    steps: int
    """Still to be taken."""
    batch_size: int
    accumulate: int
    sequence_length: int
    planned_tokens: int
    """Of the whole run."""
    tokens_per_parameter: float
    epochs: float
    """Passes over the data that the whole run makes."""
    memory: int | None
    """In use at the peak of a step, what is in use already included; None where the compiler itself ran out."""
    memory_limit: int
    """What is in use now, and what can still be had."""
    smaller: str | None
    """Flags that make the same update and fit, where this does not."""
    places: int
    """Of the first micro-batch, padding left out."""
    trained_places: int
    mask: list[str]
    """Rows of the first micro-batch, see `drawn`."""
    uniform_loss: float
    """ln(vocab): of a uniform guess."""
    first_loss: float | None = None
    """Of the first micro-batch before any update; None where a step would not fit."""
    seconds_per_step: float | None = None
    """None until it was measured."""
    seconds_to_finish: float | None = None
    """With validations, without saving."""

    @property
    def fits(self) -> bool:
        """A step's peak is within what can be had."""
        return self.memory is not None and self.memory <= self.memory_limit

    def lines(self, loss_unit: str = "nats") -> list[str]:
        """The report for people, after `headline`."""
        return [f"{name:<16}{text}".rstrip() for name, text in self._rows(loss_unit)]

    def headline(self) -> str:
        """What is trained, on what, with how much data."""
        ratio = self.tokens_per_parameter
        starved = "" if ratio >= CHINCHILLA else f" (fewer than the {CHINCHILLA} that use compute best)"
        what = f"{self.parameters:,} parameters, {self.compute_dtype} on {self.device}"
        return f"{what}, {ratio:.2g} tokens a parameter{starved}"

    def _rows(self, loss_unit: str) -> Iterator[tuple[str, str]]:
        limit = in_bytes(self.memory_limit)
        needed = "more than the compiler can handle" if self.memory is None else in_bytes(self.memory)
        yield "memory", f"{needed} at the peak of a step, {limit} can be had on {self.device}"
        yield "data", f"{self.planned_tokens:,} tokens, {self.epochs:.2g} epochs"
        share = self.trained_places / max(self.places, 1)
        yield "first batch", f"{self.trained_places:,} of {self.places:,} places train ({share:.1%})"
        for number, row in enumerate(self.mask):
            yield "" if number else "  # trains", row
        if self.first_loss is not None:
            first, guess = (run_log.told(loss, loss_unit) for loss in (self.first_loss, self.uniform_loss))
            unit, logarithm = ("", "log2") if loss_unit == "bits" else (" nats", "ln")
            yield "first loss", f"{first}{unit} a token; {logarithm}(vocab) is {guess}"
        if self.seconds_per_step is None or self.seconds_to_finish is None:
            yield "time to finish", "told after two steps"
        else:
            each = f"{self.seconds_per_step:.3g} s each"
            steps = "1 step" if self.steps == 1 else f"{self.steps:,} steps"
            yield "time to finish", f"{duration(self.seconds_to_finish)} for {steps}, {each}"

    def refuse(self) -> None:
        """Raise InputError, with the flags that fit, unless this does."""
        if self.fits:
            return
        needed = "more memory than the compiler can handle" if self.memory is None else f"{in_bytes(self.memory)}"
        remedy = f"{self.smaller} fits, and makes the same update" if self.smaller else LAST_REMEDY
        raise InputError(
            f"a step needs {needed} at its peak, {in_bytes(self.memory_limit)} can be had on {self.device}; {remedy}"
        )


LAST_REMEDY = "not even one row at a time fits: shorten --sequence-length, or choose a smaller model"


# -- Memory ----------------------------------------------------------------------------


def check_size(config: ModelConfig, shards: int = 1) -> None:
    """Refuse weights that this device could never train, before it is brought to its knees by them.

    `shards` is how many accelerators split each weight; CPU devices share one memory.

    Raises:
        InputError: with what is needed at least, and what there is.
    """
    one, two = (flops.parameter_count(dataclasses.replace(config, num_hidden_layers=n)) for n in (1, 2))
    parameters = one + (two - one) * (config.num_hidden_layers - 1)
    needed, total = LEAST_BYTES * parameters // shards, device_memory.total()
    if needed > total:
        raise InputError(
            f"training {parameters:,} parameters needs at least {in_bytes(needed)} ({LEAST_BYTES} bytes each), "
            f"{device.describe()} has {in_bytes(total)}; choose fewer layers, a smaller width or a shorter context"
        )


def step_bytes(
    config: ModelConfig, settings: TrainSettings, dtype: str, state: TrainState, layout: Layout = ALONE
) -> int | None:
    """What one step takes beside the state: its batches, and XLA's temporaries and new outputs.

    Of one accelerator, or of all a process's CPU devices, which share its memory. None where the compiler
    ran out of memory. The state is not touched: only its shapes are read.
    """
    shapes: Any = jax.tree.map(lambda a: _shape(a.shape, a.dtype, a.sharding if layout.mesh else None), state)
    batches = _batch_shapes(settings, layout)
    try:
        lowered = train_step.lower(config, settings, dtype, shapes, batches, layout=layout)
        found: Any = lowered.compile().memory_analysis()
    except Exception as error:
        if out_of_memory.means(error):
            return None
        raise
    batch_bytes = sum(array.size * array.dtype.itemsize for array in batches.values())
    # Outputs that take the place of donated arguments need no memory of their own.
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    sharing = layout.local_devices if jax.default_backend() == "cpu" else 1
    return batch_bytes + sharing * (found.temp_size_in_bytes + outputs) + found.generated_code_size_in_bytes


def _shape(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _saved_bytes(settings: TrainSettings, state: TrainState) -> int:
    """The copy that is being written while the next step runs; of an accelerator's arrays it is the host's."""
    while_training = 0 < settings.save_every < settings.steps - int(state.step)
    if jax.default_backend() != "cpu" or not while_training:
        return 0
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _batch_shapes(settings: TrainSettings, layout: Layout) -> dict[str, Any]:
    """Like `train_step.stacked` of a step's micro-batches, (A, B, T), where the layout puts them."""
    shape = (settings.accumulate, settings.batch_size, settings.sequence_length)
    arrays: Any = empty_batch(1, 1)
    placed = layout.row_sharding(shape, axis=1)
    return {name: _shape(shape, jnp.asarray(array).dtype, placed) for name, array in arrays.items()}


def smaller_step(
    config: ModelConfig,
    settings: TrainSettings,
    dtype: str,
    state: TrainState,
    needed: int | None,
    room: int,
    layout: Layout = ALONE,
) -> TrainSettings | None:
    """The largest micro-batch of the same step that fits into `room` bytes; with remat only if none does without."""
    # XLA's CPU compiler merges what is computed again with what was computed before: remat saves nothing there.
    useful = not settings.remat and jax.default_backend() != "cpu"
    for remat in (False, True) if useful else (settings.remat,):
        same = remat == settings.remat
        per_row = (needed or 0) / settings.batch_size if same else 0.0
        for size in range(settings.batch_size - same, 0, -1):
            # A step takes at least its share of what a larger one does: those far too large need no compiling.
            if settings.batch_size % size or size % layout.row_shards or per_row * size > room:
                continue
            accumulate = settings.accumulate * settings.batch_size // size
            chosen = dataclasses.replace(settings, batch_size=size, accumulate=accumulate, remat=remat)
            taken = step_bytes(config, chosen, dtype, state, layout)
            if taken is not None and taken <= room:
                return chosen
            per_row = (taken or 0) / size
    return None


def flags(settings: TrainSettings) -> str:
    """The flags that make a step of this size."""
    remat = " --remat" if settings.remat else ""
    return f"--batch-size {settings.batch_size} --accumulate {settings.accumulate}{remat}"


# -- The report ------------------------------------------------------------------------


def look(
    config: ModelConfig,
    settings: TrainSettings,
    dtype: str,
    state: TrainState,
    batches: Batches,
    layout: Layout = ALONE,
    *,
    draw: bool,
) -> Preflight:
    """Compile the step and say what the run takes; nothing is trained, and `batches` stays where it is.

    Where a step fits, the first micro-batch's loss is measured; where it does not, a smaller one is looked for.
    `draw` the mask, which is worth seeing where not everything trains.
    """
    count = flops.parameter_count(config)
    rows = settings.steps * settings.accumulate * settings.batch_size
    first = upcoming(batches)
    taken = step_bytes(config, settings, dtype, state, layout)
    saved = _saved_bytes(settings, state)
    # Only now: compiling takes memory, too, and does not give all of it back.
    # Processes decide alike: by the one with the least room.
    used, free = int(max(processes.gathered(device_memory.used()))), int(min(processes.gathered(device_memory.free())))
    found = Preflight(
        device=layout.describe(),
        compute_dtype=dtype,
        parameters=count,
        steps=settings.steps - int(state.step),
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        sequence_length=settings.sequence_length,
        planned_tokens=rows * settings.sequence_length,
        tokens_per_parameter=rows * settings.sequence_length / count,
        epochs=rows / len(batches.rows),
        memory=None if taken is None else used + saved + taken,
        memory_limit=used + free,
        smaller=None,
        places=int((first["segments"] > 0).sum()),
        trained_places=int((first["mask"] > 0).sum()),
        mask=drawn(first) if draw else [],
        uniform_loss=gates.uniform(config),
    )
    if found.fits:
        return dataclasses.replace(found, first_loss=evaluate(config, state.params, [first], dtype, layout))
    chosen = smaller_step(config, settings, dtype, state, taken, free - saved, layout)
    return dataclasses.replace(found, smaller=flags(chosen) if chosen else None)


def upcoming(batches: Batches) -> Batch:
    """The next batch, which stays the next."""
    position = batches.position()
    batch = batches.next()
    batches.seek(position)
    return batch


def drawn(batch: Batch) -> list[str]:
    """The first rows' masks, `#` where places train, `+` where some of a column's do, `.` where none does."""
    length = batch["mask"].shape[1]
    edges = np.linspace(0, length, min(length, COLUMNS) + 1).round().astype(int)
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    rows = zip(batch["mask"][:ROWS], batch["segments"][:ROWS], strict=True)
    return ["".join(_mark(mask[span], segments[span]) for span in spans).rstrip() for mask, segments in rows]


def _mark(mask: np.ndarray, segments: np.ndarray) -> str:
    if not (segments > 0).any():
        return " "
    trained = (mask > 0)[segments > 0]
    return "#" if trained.all() else "+" if trained.any() else "."


def timed(
    found: Preflight,
    config: ModelConfig,
    settings: TrainSettings,
    state: TrainState,
    micro: Sequence[Batch],
    held_out: Sequence[Batch],
    layout: Layout = ALONE,
) -> Preflight:
    """With the time of a step and of the whole run, from steps that are really taken; `state` is used up."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        placed = layout.rows(stacked(micro), axis=1)
        state, report = train_step(config, settings, found.compute_dtype, state, placed, layout=layout)
        jax.block_until_ready(report)
        seconds = time.perf_counter() - started
        if seconds > LONG_STEP:
            break
    validations = 1 + -(-found.steps // settings.eval_every) if settings.eval_every else 2
    validating = 0.0
    if held_out:
        started = time.perf_counter()
        evaluate(config, state.params, held_out[:1], found.compute_dtype, layout)
        validating = validations * len(held_out) * (time.perf_counter() - started)
    return dataclasses.replace(found, seconds_per_step=seconds, seconds_to_finish=found.steps * seconds + validating)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`, `3 days 4 h`: the two largest units."""
    whole = round(seconds)
    units = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    at = next((i for i, (size, _) in enumerate(units) if whole >= size), len(units) - 1)
    parts: list[str] = []
    for size, name in units[at : at + 2]:
        number, whole = divmod(whole, size)
        if number or not parts:
            parts.append(f"{number} {name}")
    return " ".join(parts)
