"""The one training loop: gates, steps, validation, samples, checkpoints, log.

A `Run` says what is trained on what; pretraining and SFT differ in batches and mask
only (see `jaxgpt.train`). A run ends at its last step, at a signal, at early
stopping, or at an error, and always leaves its newest state on disk.
"""

import math
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgpt
from jaxgpt import checkpoint, device, flops, gates, generate, model, run_log
from jaxgpt.chat import Template
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, Batches, DataEnded
from jaxgpt.errors import InputError
from jaxgpt.loss import Arrays, evaluate
from jaxgpt.run_lock import RunLock
from jaxgpt.settings import GenerationSettings, TrainSettings
from jaxgpt.step_folder import Contents
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.train_step import TrainState, initial_state, stacked, train_step

CHINCHILLA = 20
"""Training tokens a parameter at which compute is spent best (Hoffmann et al. 2022)."""
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
    best_validation_loss: float | None
    stop_reason: str
    """`steps`, `patience` or `signal`."""
    tokens: int
    """Trained tokens seen."""
    seconds: float


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
    fresh: bool
    """The weights are new: the first loss must be near ln(vocab)."""
    origin: dict[str, Any]
    """JSON: which command and settings; what `resume` starts from."""
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
        self.state = initial_state(run.params, run.settings)
        self.tokens = 0
        self.skipped = 0
        self.best: float | None = None
        self.validation_loss: float | None = None
        self.without_gain = 0
        self.loss = math.nan
        self.pending: Any = None
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
        moments, step, rng = jax.tree.unflatten(structure, [jnp.asarray(saved[n]) for n in names])
        self.state = TrainState(self.state.params, moments, step, rng)
        progress: Any = resumed.train_json
        self.r.batches.seek(progress["position"])
        for name in ("tokens", "skipped", "best", "validation_loss", "without_gain"):
            setattr(self, name, progress[name])

    def run(self) -> TrainResult:
        """From the present state to the end of the run."""
        started = time.monotonic()
        step = int(self.state.step)
        self._gate(step)
        self.lock.acquire()
        self.log = run_log.RunLog(self.r.out, self.settings.steps, resumed_at=step if self.r.resumed else None)
        try:
            self._announce(step)
            with _signals() as stopped:
                reason = self._steps(step, stopped)
            self._save(int(self.state.step))
            self._settle()
            self.log.write("end", int(self.state.step), reason=reason)
        finally:
            self._settle()
            self.log.close()
        return TrainResult(
            out=str(self.r.out),
            step=int(self.state.step),
            loss=self.loss,
            validation_loss=self.validation_loss,
            best_validation_loss=self.best,
            stop_reason=reason,
            tokens=self.tokens,
            seconds=round(time.monotonic() - started, 3),
        )

    def _gate(self, step: int) -> None:
        """Refuse, before anything is written, weights that cannot be right."""
        if self.r.resumed or step:
            return
        if self.r.fresh:
            gates.check_fresh(self.r.config, self.state.params, self.dtype)
            return
        sample = list(self.r.held_out[:4]) or [self._peek()]
        new = range(self.r.tokenizer.base_vocab_size, self.r.tokenizer.vocab_size)
        loss = evaluate(self.r.config, self.state.params, gates.known_targets(sample, new), self.dtype)
        gates.check_loaded(self.r.config, loss, accept=self.settings.accept_loss)

    def _peek(self) -> Batch:
        position = self.r.batches.position()
        batch = self.r.batches.next()
        self.r.batches.seek(position)
        return batch

    def _announce(self, step: int) -> None:
        count = flops.parameter_count(self.r.config)
        planned = self.settings.steps * self.settings.accumulate * self.settings.batch_size
        ratio = planned * self.settings.sequence_length / count
        starved = "" if ratio >= CHINCHILLA else f" (fewer than the {CHINCHILLA} that use compute best)"
        say = self.log.say
        for notice in self.r.notices:
            say(notice)
        if self.r.resumed:
            for notice in (*self.r.resumed.notices, f"resuming at step {step}"):
                say(notice)
        if device.overlooked_gpu():
            say("this machine has an NVIDIA GPU that JAX does not use; install jaxgpt[cuda12]")
        say(f"{count:,} parameters, {self.dtype} on {device.describe()}, {ratio:.2g} tokens a parameter{starved}")
        self.log.write(
            "start",
            step,
            device=device.describe(),
            backend=jax.default_backend(),
            compute_dtype=self.dtype,
            parameters=count,
            planned_tokens_per_parameter=ratio,
            epochs_planned=self.settings.epochs,
            versions={"jaxgpt": jaxgpt.__version__, "jax": jax.__version__},
            **self.r.origin,
        )
        if not step:
            self._validate(0)

    def _steps(self, step: int, stopped: "_Stopped") -> str:
        pace = _Pace(self.r.config, self.settings)
        while step < self.settings.steps:
            if stopped.by:
                self.log.say(f"{stopped.by} received; saving step {step}")
                return "signal"
            self._step(step, pace)
            step += 1
            last = step == self.settings.steps
            due = self.settings.eval_every and step % self.settings.eval_every == 0
            if (due or last) and self._validate(step):
                return "patience"
            if self.settings.sample_every and step % self.settings.sample_every == 0:
                self._sample(step)
            if self.settings.save_every and step % self.settings.save_every == 0 and not last:
                self._save(step)
        return "steps"

    def _step(self, step: int, pace: "_Pace") -> None:
        started = time.monotonic()
        micro = [self._next(step) for _ in range(self.settings.accumulate)]
        batches = stacked(micro)
        self.state, report = train_step(self.r.config, self.settings, self.dtype, self.state, batches)
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
        rates = pace.of(int((batches["segments"] > 0).sum()), time.monotonic() - started)
        values = {
            "loss": self.loss,
            "grad_norm": float(report.grad_norm),
            "learning_rate": float(report.learning_rate),
            **rates,
            "epoch": round(self.r.batches.epoch, 4),
            "tokens": self.tokens,
        }
        self.log.write("train", number, **values)
        mfu = f"  MFU {rates['mfu']:.1%}" if rates["mfu"] is not None else ""
        summary = f"loss {self.loss:.4f}  {rates['tokens_per_second']:,.0f} tokens/s{mfu}"
        self.log.advance(number, summary, line=number % self.settings.log_every == 0)

    def _next(self, step: int) -> Batch:
        try:
            return self.r.batches.next()
        except DataEnded as ended:
            raise ended.at_step(step, self.settings.steps) from None

    def _skip(self, step: int, batches: Arrays) -> None:
        self.skipped += 1
        path = self.r.out / f"bad-batch-{step:08d}.npz"
        arrays: Any = {name: np.asarray(array) for name, array in batches.items()}
        np.savez(path, **arrays)
        what = "loss" if not math.isfinite(self.loss) else "gradient"
        text = f"{what} NaN at step {step}; update skipped ({self.skipped} of {MOST_SKIPPED}); batch saved"
        self.log.write("skipped", step, batch=path.name, skipped=self.skipped)
        self.log.say(text)
        if self.skipped >= MOST_SKIPPED:
            raise InputError(f"{text} as {path}; lower --learning-rate or look at the batch")

    def _validate(self, step: int) -> bool:
        """Measure the held-out loss; True when it is time to stop early."""
        if not len(self.r.held_out):
            return False
        loss = evaluate(self.r.config, self.state.params, self.r.held_out, self.dtype)
        self.validation_loss = loss
        self.log.write("eval", step, loss=loss)
        self.log.say(f"step {step}: validation loss {loss:.4f}")
        if self.best is None or loss < self.best:
            self.best, self.without_gain = loss, 0
        elif step > self.settings.warmup_steps:
            self.without_gain += 1
        if self.settings.patience and self.without_gain >= self.settings.patience:
            self.log.say(f"stopping early: no better validation loss in {self.without_gain} validations")
            return True
        return False

    def _sample(self, step: int) -> None:
        cast = model.cast(self.state.params, self.dtype)
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

    def _settle(self) -> None:
        """Wait for the save under way, if any; raises CheckpointError when it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _save(self, step: int) -> None:
        self._settle()
        leaves, _ = jax.tree.flatten_with_path((self.state.moments, self.state.step, self.state.rng))
        self.pending = checkpoint.save(
            self.r.out,
            step,
            Contents(
                config=self.r.config,
                params=self.state.params,
                stage=self.r.stage,
                compute_dtype=self.dtype,
                eos_token_ids=list(self.r.tokenizer.stop_ids),
                tokenizer=self.r.tokenizer,
                template=self.r.template,
                provenance={
                    **self.r.lineage,
                    **{"parent": self.r.parent, "data": self.r.batches.fingerprint, "tokens": self.tokens},
                },
                train={jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves},
                train_json={
                    "origin": self.r.origin,
                    "position": self.r.batches.position(),
                    "tokens": self.tokens,
                    "skipped": self.skipped,
                    "best": self.best,
                    "validation_loss": self.validation_loss,
                    "without_gain": self.without_gain,
                },
            ),
            keep=self.settings.keep,
            score=self.validation_loss,
        )


class _Pace:
    """Tokens per second and MFU of a step; the first one also compiles."""

    def __init__(self, config: ModelConfig, settings: TrainSettings):
        processed = settings.batch_size * settings.accumulate * settings.sequence_length
        self.flops = processed * flops.flops_per_token(config, settings.sequence_length)
        self.peak = flops.peak(device.describe())

    def of(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Tokens a second, padding left out, and FLOPs of all places as a share of the peak."""
        mfu = self.flops / seconds / self.peak if self.peak else None
        return {"tokens_per_second": tokens / seconds, "mfu": mfu}


@dataclass
class _Stopped:
    by: str = ""


@contextmanager
def _signals() -> Generator[_Stopped]:
    """SIGTERM and SIGINT end the run after the present step; a second SIGINT ends it at once."""
    stopped = _Stopped()

    def stop(number: int, _: Any) -> None:
        if stopped.by and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.by = signal.Signals(number).name

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller owns the signals
        yield stopped
        return
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
