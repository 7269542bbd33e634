"""The one training loop: gates, steps, validation, samples, checkpoints, log.

A `Run` says what is trained on what; pretraining and SFT differ in batches and mask
only (see `jaxgpt.train`). A run ends at its last step, at a signal, at early
stopping, or at an error, and always leaves its newest state on disk.
"""

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxgpt
from jaxgpt import (
    checkpoint,
    device,
    device_memory,
    flops,
    gates,
    generate,
    golden_prompts,
    model,
    preflight,
    processes,
    run_log,
)
from jaxgpt.array_files import in_bytes
from jaxgpt.chat import Template
from jaxgpt.checkpoint import Checkpoint, CheckpointError, Saving
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, Batches, DataEnded
from jaxgpt.errors import InputError
from jaxgpt.loss import evaluate
from jaxgpt.mesh import Layout
from jaxgpt.preflight import Preflight
from jaxgpt.run_lock import RunLock
from jaxgpt.settings import GenerationSettings, TrainSettings
from jaxgpt.step_folder import Contents
from jaxgpt.stop_signals import StopSignals
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.train_step import TrainState, initial_state, stacked, train_step

MOST_SKIPPED = 3
"""Updates in a row that may be skipped for a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    out: str
    step: int
    loss: float
    """Of the last step, nats a trained token."""
    validation_loss: float | None
    validated_at: int | None
    """The step of which that is."""
    best_validation_loss: float | None
    stop_reason: str
    """`steps`, `patience` or `signal`."""
    tokens: int
    """Trained tokens seen."""
    seconds: float
    memory_estimate: int | None = None
    """Bytes at the peak, as told before the first step."""
    memory_peak: int | None = None
    """Bytes that were in use at the peak; None where the process had used more before, or took no step."""


@dataclass(frozen=True)
class Run:
    """What a run is made of."""

    out: Path
    settings: TrainSettings
    stage: str
    config: ModelConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    template: Template | None
    batches: Batches
    held_out: Sequence[Batch]
    layout: Layout
    """Where parameters and rows lie; `params` are whole, or lie there already."""
    fresh: bool
    """The weights are new: the first loss must be near ln(vocab)."""
    origin: dict[str, Any]
    """JSON: which command, settings and held-out data; what `resume` starts from."""
    parent: str | None = None
    """The checkpoint the weights came from."""
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What stays true of it: see `hf_settings.LINEAGE`."""
    resumed: Checkpoint | None = None
    notices: Sequence[str] = ()
    """Lines to print before the first step: what was chosen for the user."""


class Loop:
    """The steps of one run."""

    def __init__(self, run: Run, lock: RunLock):
        self.r = run
        self.lock = lock
        self.settings = run.settings
        self.dtype = self._compute_dtype()
        self._check_data()
        self.state = initial_state(run.params, run.settings, run.layout)
        self.tokens = 0
        self.skipped = 0
        self.best: float | None = None
        self.validation_loss: float | None = None
        self.without_gain = 0
        self.loss = math.nan
        self.validated = -1
        """The step whose held-out loss was last measured."""
        self.saved = -1
        """The step that is saved, or being saved."""
        self.pending: Saving | None = None
        self.failure: CheckpointError | None = None
        """Why the newest save came to nothing."""
        self.stops = StopSignals()
        self.log: run_log.RunLog | run_log.NoLog = run_log.NoLog()
        self.divergence = gates.Divergence(run.config, run.settings.learning_rate)
        if run.resumed:
            self._restore(run.resumed)

    def _compute_dtype(self) -> str:
        if self.settings.compute_dtype != "auto":
            return self.settings.compute_dtype
        return "bfloat16" if jax.default_backend() == "gpu" else "float32"

    def _check_data(self) -> None:
        needed = self.settings.steps * self.settings.accumulate
        if self.r.batches.total_batches < needed:
            step = self.r.batches.total_batches // self.settings.accumulate
            raise DataEnded(self.r.batches.total_batches).at_step(step, self.settings.steps)

    def _restore(self, resumed: Checkpoint) -> None:
        leaves, structure = jax.tree.flatten_with_path((self.state.moments, self.state.step, self.state.rng))
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        saved: Any = resumed.train
        wrong = [
            n for n, (_, leaf) in zip(names, leaves, strict=True) if n not in saved or saved[n].shape != leaf.shape
        ]
        if wrong or len(saved) != len(names):
            raise InputError(f"the optimizer state of {resumed.path} is another optimizer's ({wrong[:1]})")
        placed = [self.r.layout.like(saved[n], leaf) for n, (_, leaf) in zip(names, leaves, strict=True)]
        moments, step, rng = jax.tree.unflatten(structure, placed)
        self.state = TrainState(self.state.params, moments, step, rng)
        progress: Any = resumed.train_json
        self.r.batches.seek(progress["position"])
        for name in ("tokens", "skipped", "best", "validation_loss", "without_gain"):
            setattr(self, name, progress[name])
        # Steps of before this was noted were saved after their validation.
        self.validated = progress.get("validated", resumed.step)

    def run(self) -> TrainResult:
        """From the present state to the end of the run."""
        started = time.monotonic()
        step = int(self.state.step)
        try:
            with self.stops.watched():
                before = self._open(step)
                self._announce(step)
                reason = self._steps(step)
                self._finish(int(self.state.step))
            peak = self._peak(before) if int(self.state.step) > step else None
            if processes.first() and reason != "signal":  # who sends one does not wait
                self._prove()
            self.log.write("end", int(self.state.step), reason=reason, memory_peak=peak)
        except Exception as error:
            if processes.lost(error):
                self.pending = None  # it waits for the others' parts
            raise
        finally:
            self._settle()
            self.log.close()
        return TrainResult(
            out=str(self.r.out),
            step=int(self.state.step),
            loss=self.loss,
            validation_loss=self.validation_loss,
            validated_at=self.validated if self.validation_loss is not None else None,
            best_validation_loss=self.best,
            stop_reason=reason,
            tokens=self.tokens,
            seconds=round(time.monotonic() - started, 3),
            memory_estimate=self.preflight.memory,
            memory_peak=peak,
        )

    def _open(self, step: int) -> int:
        """Refuse what cannot be run, then begin to write; the memory in use at the peak until then."""
        self.preflight = self._look()
        self.preflight.refuse()
        self._gate(step)
        before = device_memory.peak()
        self.lock.acquire()
        self._prepare(step)
        if processes.first():
            resumed_at = step if self.r.resumed else None
            self.log = run_log.RunLog(self.r.out, self.settings.steps, resumed_at=resumed_at)
        return before

    def dry_run(self) -> Preflight:
        """What the run would take; where it fits, a step or two are taken, and nothing is kept of them.

        Raises:
            InputError: see `jaxgpt.gates`.
        """
        step = int(self.state.step)
        found = self._look()
        if not found.fits or step >= self.settings.steps:
            return found
        self._gate(step)
        micro = [self._next(step) for _ in range(self.settings.accumulate)]
        return preflight.timed(found, self.r.config, self.settings, self.state, micro, self.r.held_out, self.r.layout)

    def _look(self) -> Preflight:
        draw = self.r.stage == "sft"
        return preflight.look(
            self.r.config, self.settings, self.dtype, self.state, self.r.batches, self.r.layout, draw=draw
        )

    def _peak(self, before: int) -> int | None:
        """Most memory in use since the run began; said where the estimate was wrong by more than a quarter."""
        peak, estimate = device_memory.peak(), self.preflight.memory
        if peak <= before or estimate is None:
            return None
        if not 0.8 * peak <= estimate <= 1.25 * peak:
            self.log.say(f"memory: {in_bytes(peak)} at the peak, {in_bytes(estimate)} had been expected")
        return peak

    def _gate(self, step: int) -> None:
        """Refuse, before anything is written, weights that cannot be right.

        After a signal there is no time for it: the run that goes on from step 0 begins with it.
        """
        if step or self.stops.told():
            return
        if self.r.fresh:
            gates.check_fresh(self.r.config, self.state.params, self.dtype, self.r.layout)
            return
        sample = list(self.r.held_out[:4]) or [preflight.upcoming(self.r.batches)]
        new = range(self.r.tokenizer.base_vocab_size, self.r.tokenizer.vocab_size)
        known = gates.known_targets(sample, new)
        loss = evaluate(self.r.config, self.state.params, known, self.dtype, self.r.layout)
        gates.check_loaded(self.r.config, loss, accept=self.settings.accept_loss)

    def _announce(self, step: int) -> None:
        found = self.preflight
        say = self.log.say
        for notice in self.r.notices:
            say(notice)
        if self.r.resumed:
            for notice in (*self.r.resumed.notices, f"resuming at step {step}"):
                say(notice)
        if device.overlooked_gpu():
            say("this machine has an NVIDIA GPU that JAX does not use; install jaxgpt[cuda12]")
        for line in (found.headline(), *found.lines(self.settings.loss_unit)):
            say(line)
        self.log.write(
            "start",
            step,
            device=self.r.layout.describe(),
            processes=processes.count(),
            backend=jax.default_backend(),
            compute_dtype=self.dtype,
            parameters=found.parameters,
            planned_tokens_per_parameter=found.tokens_per_parameter,
            epochs_planned=self.settings.epochs,
            versions={"jaxgpt": jaxgpt.__version__, "jax": jax.__version__},
            **self.r.origin,
        )
        self.log.write("preflight", step, **dataclasses.asdict(found))

    def _steps(self, step: int) -> str:
        pace = _Pace(self.r.config, self.settings, self.r.layout.devices)
        if self._owes_validation(step) and self._validate(step):
            return "patience"
        while step < self.settings.steps and not self.stops.told():
            self._step(step, pace)
            step += 1
            self._settle(wait=False)
            if self._owes_validation(step) and self._validate(step):
                return "patience"
            if self.settings.sample_every and step % self.settings.sample_every == 0 and not self.stops.told():
                self._sample(step)
            if self.settings.save_every and step % self.settings.save_every == 0 and step < self.settings.steps:
                self._save(step)
        if self.stops.told() and (step < self.settings.steps or self._owes_validation(step)):
            self.log.say(f"{self.stops.by} received; saving step {step}")
            return "signal"
        return "steps"

    def _owes_validation(self, step: int) -> bool:
        due = step in (0, self.settings.steps) or (self.settings.eval_every and step % self.settings.eval_every == 0)
        return bool(due) and len(self.r.held_out) > 0 and self.validated < step

    def _step(self, step: int, pace: "_Pace") -> None:
        started = time.monotonic()
        micro = [self._next(step) for _ in range(self.settings.accumulate)]
        batches = stacked(micro)
        layout, placed = self.r.layout, self.r.layout.rows(batches, axis=1)
        self.state, report = train_step(self.r.config, self.settings, self.dtype, self.state, placed, layout=layout)
        self.loss = float(report.loss)
        number = step + 1
        if step == 0 and self.r.fresh and bool(report.applied):
            gates.check_first_batch(self.r.config, self.loss)
        if not bool(report.applied):
            self._skip(number, batches)
            return
        self.skipped = 0
        trained = int(batches["mask"].sum())
        self.tokens += trained
        seconds = time.monotonic() - started
        rates = pace.of(int((batches["segments"] > 0).sum()), seconds)
        values = {
            "loss": self.loss,
            "grad_norm": float(report.grad_norm),
            "learning_rate": float(report.learning_rate),
            **rates,
            "epoch": round(self.r.batches.epoch, 4),
            "tokens": self.tokens,
        }
        self.log.write("train", number, **values, batch_sha256=_digest(micro))
        mfu = f"  MFU {rates['mfu']:.1%}" if rates["mfu"] is not None else ""
        loss = run_log.told(self.loss, self.settings.loss_unit)
        summary = f"loss {loss}  {rates['tokens_per_second']:,.0f} tokens/s{mfu}"
        self.log.advance(number, summary, line=number % self.settings.log_every == 0)
        self.divergence.watch(number, self.loss)
        remaining = self.settings.steps - number
        if pace.steps == 2 and remaining:
            self.log.say(f"{preflight.duration(remaining * seconds)} to finish, {seconds:.3g} s a step")

    def _next(self, step: int) -> Batch:
        try:
            return self.r.batches.next()
        except DataEnded as ended:
            raise ended.at_step(step, self.settings.steps) from None

    def _skip(self, step: int, batches: Mapping[str, np.ndarray]) -> None:
        self.skipped += 1
        path = self.r.out / f"bad-batch-{step:08d}.npz"
        arrays: Any = batches
        try:
            if processes.first():
                np.savez(path, **arrays)
            kept = "batch saved"
        except OSError as error:
            kept = f"batch not saved ({error.strerror})"
        what = "loss" if not math.isfinite(self.loss) else "gradient"
        text = f"{what} NaN at step {step}; update skipped ({self.skipped} of {MOST_SKIPPED}); {kept}"
        self.log.write("skipped", step, batch=path.name, skipped=self.skipped)
        self.log.say(text)
        if self.skipped >= MOST_SKIPPED:
            raise InputError(f"{text} as {path}; lower --learning-rate or look at the batch")

    def _validate(self, step: int) -> bool:
        """Measure the held-out loss; True when it is time to stop early.

        A signal cuts it short, and the run that goes on from here begins with it.
        """
        batches = itertools.takewhile(lambda _: not self.stops.told(), self.r.held_out)
        loss = evaluate(self.r.config, self.state.params, batches, self.dtype, self.r.layout)
        if self.stops.told():
            return False
        finite = math.isfinite(loss)
        # A NaN would be the best ever seen, and JSON has none: the step could not be saved.
        self.validation_loss, self.validated = loss if finite else None, step
        self.log.write("eval", step, loss=loss)
        self.log.say(f"step {step}: validation loss {run_log.told(loss, self.settings.loss_unit)}")
        if finite and (self.best is None or loss < self.best):
            self.best, self.without_gain = loss, 0
        elif step > self.settings.warmup_steps:
            self.without_gain += 1
        if self.settings.patience and self.without_gain >= self.settings.patience:
            self.log.say(f"stopping early: no better validation loss in {self.without_gain} validations")
            return True
        return False

    def _sample(self, step: int) -> None:
        cast = self.r.layout.local(model.cast(self.state.params, self.dtype))
        if not processes.first():
            return
        tokenizer = self.r.tokenizer
        generator = generate.Generator(
            self.r.config, cast, real_ids=tokenizer.vocab_size, stop_ids=tokenizer.stop_ids, dtype=self.dtype
        )
        ids = tokenizer.encode(self.settings.sample_prompt)
        room = self.r.config.max_position_embeddings - len(ids)
        chunks = generator.stream([generate.Row(ids, min(48, room), 0)], GenerationSettings())
        text = tokenizer.decode([i for (new,) in chunks for i in new], skip_specials=True)
        self.log.write("sample", step, prompt=self.settings.sample_prompt, text=text)
        self.log.say(f"step {step} sample: {self.settings.sample_prompt!r} → {text!r}")

    def _prepare(self, step: int) -> None:
        """Refuse, before the first step, a disk on which the saves of this run can only fail."""
        if step < self.settings.steps and processes.first():
            remaining = self.settings.steps - step
            saves = -(-remaining // self.settings.save_every) if self.settings.save_every else 1
            checkpoint.prepare(self.r.out, self._contents(), saves=saves, keep=self.settings.keep)

    def _settle(self, *, wait: bool = True) -> None:
        """Say what became of the save under way; one that failed costs nothing, the next may succeed."""
        if self.pending is None or not (wait or self.pending.ended(within=0)):
            return
        saving, self.pending, self.failure = self.pending, None, None
        try:
            saving.result()
        except CheckpointError as error:
            self.failure = error
            self.log.write("save failed", self.saved, reason=str(error))
            self.log.say(str(error))
        else:
            self.log.write("save", self.saved)

    def _save(self, step: int) -> None:
        self._settle()
        self.log.sync()
        self.saved = step
        self.pending = checkpoint.save(
            self.r.out, step, self._contents(), keep=self.settings.keep, score=self.validation_loss
        )

    def _finish(self, step: int) -> None:
        """The newest state is on disk, or it is an error; only the first process knows of either."""
        if processes.any_of(self.saved != step or self.failure is not None):
            self._save(step)
        self._settle()
        if processes.any_of(self.failure is not None):
            raise self.failure or CheckpointError(f"step {step} was not saved: see the first process")

    def _prove(self) -> None:
        """Give the last step its golden prompts."""
        notice = golden_prompts.add(self.r.out)
        if notice:
            self.log.say(notice)

    def _contents(self) -> Contents:
        leaves, _ = jax.tree.flatten_with_path((self.state.moments, self.state.step, self.state.rng))
        return Contents(
            config=self.r.config,
            params=self.state.params,
            stage=self.r.stage,
            compute_dtype=self.dtype,
            eos_token_ids=list(self.r.tokenizer.stop_ids),
            tokenizer=self.r.tokenizer,
            template=self.r.template,
            provenance=dict(self.r.lineage)
            | {"parent": self.r.parent, "data": self.r.batches.fingerprint, "tokens": self.tokens},
            train={jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves},
            train_json={
                "origin": self.r.origin,
                "position": self.r.batches.position(),
                "tokens": self.tokens,
                "skipped": self.skipped,
                "best": self.best,
                "validation_loss": self.validation_loss,
                "validated": self.validated,
                "without_gain": self.without_gain,
            },
        )


def _digest(batches: Sequence[Batch]) -> str:
    """Of all arrays of a step's micro-batches: two runs that log the same saw the same."""
    found = hashlib.sha256()
    for batch in batches:
        arrays: Any = batch
        for name, array in sorted(arrays.items()):
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:16]


class _Pace:
    """Tokens per second and MFU of a step; the first one also compiles."""

    def __init__(self, config: ModelConfig, settings: TrainSettings, devices: int):
        processed = settings.batch_size * settings.accumulate * settings.sequence_length
        self.flops = processed * flops.flops_per_token(config, settings.sequence_length)
        peak = flops.peak(device.describe())
        self.peak = peak * devices if peak else None
        self.steps = 0

    def of(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Tokens a second, padding left out, and FLOPs of all places as a share of the peak."""
        self.steps += 1
        mfu = self.flops / seconds / self.peak if self.peak else None
        return {"tokens_per_second": tokens / seconds, "mfu": mfu}
