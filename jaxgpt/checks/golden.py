"""Does the model answer here as it did where it was made? See `jaxgpt.golden_prompts`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import golden_prompts
from jaxgpt.checks.noise import ALLOWED, measured
from jaxgpt.checks.report import CheckLine, token
from jaxgpt.errors import InputError
from jaxgpt.golden_prompts import Golden, GoldenPrompt
from jaxgpt.lm import LM
from jaxgpt.step_folder import GOLDEN

NAME = "golden_prompts_test"
_CAUSES = "weights, settings or code are not those that made it; restore the checkpoint"


def golden_prompts_test(lm: LM, folder: Path | None = None, *, bits: bool = True) -> CheckLine:
    """The golden prompts in a step's folder again: bit for bit where they were made, elsewhere within noise.

    TIE: an id differs where the two best are closer than rounding moves them.

    Args:
        lm: the model.
        folder: with its golden prompts.
        bits: a difference within noise is a failure where they were made.
    """
    golden = golden_prompts.read(folder) if folder else None
    if golden is None:
        return CheckLine(
            NAME, "SKIP", "the checkpoint carries none: a step from the middle of a run, or of an older jaxgpt"
        )
    problem = next(_misfits(golden, lm), None)
    if problem is not None:
        return CheckLine(NAME, "FAIL", problem)
    try:
        ids, logits = golden_prompts.ask(lm, [row.ids for row in golden.prompts], len(golden.prompts[0].greedy))
    except InputError as error:
        return CheckLine(NAME, "FAIL", f"{error}, and were where the golden prompts were made; {_CAUSES}")
    asked = f"{len(golden.prompts)} prompts, {sum(len(row.greedy) for row in golden.prompts)} greedy ids"
    if all(golden_prompts.digest(own) == row.sha256 for row, own in zip(golden.prompts, logits, strict=True)):
        return CheckLine(NAME, "PASS", f"{asked} and their logits are those of {_place(golden)}, bit for bit")
    return _compared(golden, lm, ids, _Distances.of(golden, lm), asked, bits=bits)


def _misfits(golden: Golden, lm: LM) -> Iterator[str]:
    """What makes asking pointless: another vocabulary, tokenizer or dtype, or a context that is too short."""
    if golden.vocab_size != lm.config.vocab_size:
        yield f"{GOLDEN} is of a model with {golden.vocab_size:,} ids, this one has {lm.config.vocab_size:,}"
    if golden.compute_dtype != lm.compute_dtype:
        yield f"{GOLDEN} was made computing in {golden.compute_dtype}, the checkpoint computes in {lm.compute_dtype}"
    steps = len(golden.prompts[0].greedy)
    longest = max(len(row.ids) + len(row.greedy) for row in golden.prompts)
    if longest > lm.config.max_position_embeddings or any(len(row.greedy) != steps for row in golden.prompts):
        limit = lm.config.max_position_embeddings
        yield f"{GOLDEN} has {longest} ids in a row, the model's context holds {limit}; {_CAUSES}"
    for row in golden.prompts:
        yield from _encoded_otherwise(row, lm)


def _encoded_otherwise(row: GoldenPrompt, lm: LM) -> Iterator[str]:
    if row.prompt is None:
        return
    if lm.tokenizer is None:
        yield f"the golden prompt {_shown(row)} is text, and the checkpoint has no tokenizer; restore the one it had"
        return
    ids = golden_prompts.encoded(lm, row.prompt)
    if ids != row.ids:
        yield (
            f"the tokenizer makes of {_shown(row)} the ids {_some(ids)}, and made {_some(row.ids)} where the model was "
            "saved: tokenizer or template are others; restore the checkpoint"
        )


# -- Compared --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Distances:
    """How far the logits of whole forwards over the golden ids are from the golden ones, and the noise of such."""

    far: list[tuple[float, int, GoldenPrompt]]
    """Root mean square over the vocabulary, step and prompt, largest first."""
    noise: float

    @classmethod
    def of(cls, golden: Golden, lm: LM) -> "_Distances":
        rows = [row.ids + row.greedy for row in golden.prompts]
        T = max(map(len, rows))
        padded = np.zeros((len(rows), T), np.int32)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = row
        with golden_prompts.exactly():
            whole = lm.logits(padded)
            noise = measured(whole, lm.config, lm.params, jnp.asarray(padded), tail=T)
        far: list[tuple[float, int, GoldenPrompt]] = []
        for own, row in zip(whole, golden.prompts, strict=True):
            for place in row.places:
                delta = golden_prompts.sketch(own[len(row.ids) - 1 + place.step]) - np.array(place.sketch)
                far.append((float(np.sqrt(np.square(delta).mean())), place.step, row))
        return cls(sorted(far, key=lambda found: -found[0]), noise)


def _compared(golden: Golden, lm: LM, ids: np.ndarray, distances: _Distances, asked: str, *, bits: bool) -> CheckLine:
    """The verdict where bits differ."""
    (furthest, step, row), noise = distances.far[0], distances.noise
    much = f"{furthest:.2g} (RMS over the vocabulary), {_times(furthest, noise)} the measured noise of {noise:.2g}"
    apart = f"the logits after {_shown(row)} and {step} greedy ids are {much}, from those of {_place(golden)}"
    if not furthest <= ALLOWED * noise:
        return CheckLine(NAME, "FAIL", f"{apart} (allowed {ALLOWED:g}): {_CAUSES}")
    ties: list[str] = []
    for row, own in zip(golden.prompts, ids.tolist(), strict=True):
        at = next((step for step, pair in enumerate(zip(own, row.greedy, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            continue
        text = (
            f"after {_shown(row)} greedy id {at + 1} is {token(lm.tokenizer, own[at])}, on {_place(golden)} it was "
            f"{token(lm.tokenizer, row.greedy[at])}, {row.margins[at]:.2g} ahead"
        )
        # Each of the two logits may have moved by what is allowed.
        if not row.margins[at] <= 2 * ALLOWED * noise:
            return CheckLine(NAME, "FAIL", f"{text}, more than the measured noise of {noise:.2g} explains: {_CAUSES}")
        ties.append(f"{text}, within the measured noise of {noise:.2g}")
    if bits and _is_here(golden):
        return CheckLine(
            NAME, "FAIL", f"{apart}: no more than rounding, but nothing that rounds has changed: {_CAUSES}"
        )
    if ties:
        return CheckLine(NAME, "TIE", ties[0])
    return CheckLine(NAME, "PASS", f"{asked} are those of {_place(golden)}; {apart} (allowed {ALLOWED:g})")


def _is_here(golden: Golden) -> bool:
    """Whether the same bits are due: a GPU's kernels are chosen anew by every process."""
    here = golden_prompts.surroundings()
    return golden.made_on == here and here["backend"] == "cpu"


def _times(distance: float, noise: float) -> str:
    return f"{distance / noise:.2g} ×" if noise else "beyond"


def _place(golden: Golden) -> str:
    """`cpu (Intel Xeon), jax 0.10.2`, or `this machine`."""
    if _is_here(golden):
        return "this machine"
    made: dict[str, Any] = golden.made_on
    names = [str(made[key]) for key in ("device", "processor") if made.get(key)]
    return f"{', '.join(names)} with jax {made.get('jax', 'unknown')}"


def _shown(row: GoldenPrompt) -> str:
    if isinstance(row.prompt, str):
        return repr(row.prompt)
    return repr(row.prompt[-1].get("content")) if row.prompt else f"the ids {_some(row.ids)}"


def _some(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:6]))}{', …' if ids[6:] else ''}]"
