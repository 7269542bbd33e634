"""Temperature 0 means the most likely id that exists, whatever else is set."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.checks.parity import LENGTHS, conversation_of, short_prompts, too_short, traced
from jaxgpt.checks.report import CheckLine, judged, token
from jaxgpt.lm import LM
from jaxgpt.settings import GenerationSettings

OTHER_KNOBS: dict[str, Any] = {
    **{"top_k": 3, "top_p": 0.2, "min_p": 0.9, "seed": 11},
    **{"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
"""Settings that greedy decoding must ignore."""


def greedy_is_greedy_test(lm: LM) -> CheckLine:
    """Greedy ids are the argmax of the raw logits over real ids, with any other knob; padded rows never win."""
    name = "greedy_is_greedy_test"
    if too_short(lm):
        return CheckLine(name, "SKIP", "the context is shorter than 4 tokens")
    prompts, steps = short_prompts(lm)
    conversation = conversation_of(
        lm.generator, len(prompts), max(map(len, prompts)) + steps, GenerationSettings(**OTHER_KNOBS)
    )
    conversation.append(prompts)
    ids, logits = traced(conversation, steps)
    problems = itertools.chain(
        _argmax_problems(lm, ids, logits),
        _knob_problems(lm, prompts, ids, steps),
        _forced_problems(lm),
    )
    count = sum(map(len, ids))
    padded = int((logits[:, :steps].argmax(axis=-1) >= lm.real_ids).sum())
    detail = f"{count} ids are the argmax of the raw logits, also with top_k, top_p and seed set"
    if lm.real_ids < lm.config.vocab_size:
        detail += f"; a padded row would have won {padded} times, and was never sampled"
    return judged(name, problems, detail)


def _argmax_problems(lm: LM, ids: Sequence[Sequence[int]], logits: np.ndarray) -> Iterator[str]:
    for row, new in enumerate(ids):
        for step, id in enumerate(new):
            best = int(logits[row, step, : lm.real_ids].argmax())
            if id != best:
                raw = logits[row, step]
                yield (
                    f"temperature 0 is not greedy: step {step}, row {row} gave {token(lm.tokenizer, id)} (raw logit "
                    f"{raw[id]:.4g}), the most likely is {token(lm.tokenizer, best)} ({raw[best]:.4g})"
                )


def _knob_problems(lm: LM, prompts: list[list[int]], ids: Sequence[Sequence[int]], steps: int) -> Iterator[str]:
    """Through `LM.generate`; a template's stop text may end it earlier."""
    for knobs in ({}, OTHER_KNOBS):
        completions = lm.generate(prompts, max_new_tokens=steps, temperature=0.0, **knobs)
        for row, (completion, new) in enumerate(zip(completions, ids, strict=True)):
            if completion.ids != new[: len(completion.ids)]:
                yield (
                    f"temperature 0 is not greedy: with {knobs or 'no other knob'} row {row} gave {completion.ids}, "
                    f"expected {new}"
                )


def _forced_problems(lm: LM) -> Iterator[str]:
    """A repeated id a hair ahead, and a padded row far ahead: a penalty, or padding, would change the winner."""
    ordinary = [id for id in range(lm.real_ids) if id not in lm.generator.stop_ids][:3]
    if len(ordinary) < 3 or lm.config.max_position_embeddings < 6:
        return
    a, b, other = ordinary
    rows = np.full((len(LENGTHS), lm.config.vocab_size), -5.0, np.float32)
    # Positive and negative by turns: a penalty divides the one and multiplies the other.
    rows[0::2, [b, other]] = 1.0, 0.999
    rows[1::2, [b, other]] = -1.0, -1.001
    for settings in (GenerationSettings(**OTHER_KNOBS), GenerationSettings(temperature=1.0, top_k=1)):
        certain = rows.copy()
        certain[:, lm.real_ids :] = 100.0
        for row, id in enumerate(_next_ids(lm, [a, b, a, b, a], certain, settings)):
            if id >= lm.real_ids:
                yield f"the padded row {id} was sampled; the tokenizer has {lm.real_ids} ids"
            elif id != b and settings.temperature == 0:
                yield (
                    f"temperature 0 is not greedy: of {b} (logit {rows[row, b]:g}) and {other} ({rows[row, other]:g}) "
                    f"it took {id}; {b} was in the prompt twice, so a repetition penalty is at work"
                )


def _next_ids(lm: LM, prompt: list[int], logits: np.ndarray, settings: GenerationSettings) -> list[int]:
    """What the real decode loop draws from given logits."""
    rows = len(logits)
    conversation = conversation_of(lm.generator, rows, len(prompt) + 1, settings)
    conversation.append([prompt] * rows)
    conversation.logits = jnp.asarray(logits)
    (ids,) = conversation.generate([1] * rows)
    return [new[0] for new in ids]


def cache_dtype_test(lm: LM) -> CheckLine:
    """The cache stores keys and values in the dtype they are computed in."""
    compute = jnp.dtype(lm.compute_dtype)
    # As many rows as the other checks have, so that nothing new compiles.
    conversation = conversation_of(lm.generator, len(LENGTHS), 1, GenerationSettings())
    conversation.append([[0]] * len(LENGTHS))
    kept = {jnp.dtype(buffer.dtype) for buffer in (*conversation.cache.keys, *conversation.cache.values)}
    weights = {jnp.dtype(array.dtype) for array in lm.generator.params.values()}
    names = {what: ", ".join(sorted(map(str, dtypes))) for what, dtypes in (("cache", kept), ("weights", weights))}
    problems = [
        f"the {what} is {names[what]}, compute is {compute}"
        for what, dtypes in (("cache", kept), ("weights", weights))
        if dtypes != {compute}
    ]
    return judged("cache_dtype_test", problems, f"cache, weights and compute are {compute}")
