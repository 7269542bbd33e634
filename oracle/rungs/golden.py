"""Rung golden: the checkpoint's golden prompts, continued by the reference.

`jaxgpt check` asks jaxgpt again, whose mistakes may be those of the day the answers
were written. Here the reference answers: it must choose the same ids, but for ties, and
be no further from the fingerprint of the logits than rounding takes its own draws.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from jaxgpt.golden_prompts import Golden, GoldenPrompt, sketch
from oracle import noise
from oracle.comparison import Comparison
from oracle.results import Finding, RungResult, Token
from oracle.rungs import decode

NAME = "golden"


def run(comparison: Comparison) -> RungResult:
    """For each prompt a finding about its ids, then one for each of its fingerprints."""
    golden, candidate = comparison.golden, comparison.candidate
    assert golden is not None, "only checkpoints that have them are asked"
    if golden.compute_dtype != candidate.dtype:
        why = f"they were answered in {golden.compute_dtype}, the comparison is in {candidate.dtype}"
        return RungResult(NAME, [], f"not compared: {why}")
    problem = _misfit(golden, comparison)
    if problem:
        return RungResult(NAME, [Finding("logits", "", ok=False, problem=problem)], problem)
    findings, tokens = list[Finding](), list[Token]()
    for number, row in enumerate(golden.prompts):
        choices = decode.judged(
            candidate, comparison.reference, comparison.judge(decode.NAME), number, row.ids, row.greedy
        )
        tokens += choices.tokens
        findings.append(Finding("logits", "", ok=not choices.wrong, where=_shown(row), problem=choices.wrong))
        findings += _fingerprints(comparison, row)
    outcomes = Counter(token.outcome for token in tokens)
    furthest = max((found.worst for found in findings), default=0.0)
    summary = (
        f"{len(golden.prompts)} prompts: {outcomes['exact']} of {len(tokens)} greedy ids are the reference's, "
        f"{outcomes['tie']} certified ties; logits within {furthest:.2g}x noise"
    )
    return RungResult(NAME, findings, summary, tokens=tokens)


def _misfit(golden: Golden, comparison: Comparison) -> str:
    """What keeps the reference from being asked at all."""
    config = comparison.candidate.config
    if golden.vocab_size != config.vocab_size:
        return f"golden.json is of a model with {golden.vocab_size:,} ids, this one has {config.vocab_size:,}"
    longest = max(len(row.ids) + len(row.greedy) for row in golden.prompts)
    if longest > config.max_position_embeddings:
        return f"golden.json has {longest} ids in a row, the context holds {config.max_position_embeddings}"
    return ""


def _fingerprints(comparison: Comparison, row: GoldenPrompt) -> Iterator[Finding]:
    """How far the reference's logits are from those that were sketched, in multiples of what rounding moves its own.

    Each is told from 32 projections, within a quarter of the truth mostly; the limit is that of decoding's logits.
    """
    ids, last = np.array([[*row.ids, *row.greedy]]), slice(len(row.ids) - 1, None)
    reference, dtype = comparison.reference, comparison.candidate.dtype
    truth = reference.truth.logits(ids)[0, last]
    draws = [draw[0, last] - truth for draw in reference.logit_draws(ids)]
    unit = max(float(_rms(draw).max()) for draw in draws)
    limit = comparison.calibration.threshold(decode.NAME, dtype, "head")[1]
    for place in row.places:
        size = float(_rms(truth[place.step]))
        far = float(_rms(np.array(place.sketch) - sketch(truth[place.step])))
        ratio = far / max(unit, noise.EPSILON[dtype] * size)
        where = f"{_shown(row)}, {place.step} greedy ids on"
        yield Finding("logits", "", ratio <= limit, far / size, ratio, ratio, (limit, limit), where)


def _rms(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(array.astype(np.float64)).mean(axis=-1))


def _shown(row: GoldenPrompt) -> str:
    if isinstance(row.prompt, str):
        return f"after {row.prompt!r}"
    return f"after {len(row.ids)} ids of {'a conversation' if row.prompt else 'no text'}"
