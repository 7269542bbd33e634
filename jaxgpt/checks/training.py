"""What trains, and that what was trained comes out again."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt import chat, generate, model
from jaxgpt.chat import Message, Rendered, Template
from jaxgpt.checks.report import CheckLine, judged, token
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, EpisodeRows, Validation
from jaxgpt.data.episodes import check_mask
from jaxgpt.data.instructions import MICRO
from jaxgpt.errors import InputError
from jaxgpt.lm import LM
from jaxgpt.settings import TrainSettings
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.train_step import initial_state, stacked, train_step

CONVERSATIONS: tuple[list[Message], ...] = (
    [Message(role="user", content="Say OK."), Message(role="assistant", content="OK.")],
    [
        Message(role="system", content="Be brief."),
        Message(role="user", content="Repeat: one two"),
        Message(role="assistant", content="one two"),
        Message(role="user", content="Again."),
        Message(role="assistant", content="one two"),
    ],
)
MEMORIZED = MICRO[::2]
MEMORIZE_STEPS = 300
MEMORIZE_UNDER = 50_000_000
"""Parameters below which a model is overfitted without being asked to."""
LEARNED = 0.02
"""Nats a trained token: every token of an answer is then all but certain."""

# -- Loss mask -------------------------------------------------------------------------


def loss_mask_test(lm: LM) -> CheckLine:
    """Of a conversation, exactly the replies and their end tokens train, as rendered and in batches."""
    name, tokenizer, template = "loss_mask_test", lm.tokenizer, lm.template
    if tokenizer is None or template is None:
        return CheckLine(name, "SKIP", f"the checkpoint has no {'chat template' if tokenizer else 'tokenizer'}")
    conversations = [
        messages for messages in CONVERSATIONS if {message["role"] for message in messages} <= set(template.roles)
    ]
    if not conversations:
        return CheckLine(name, "SKIP", f"template {template.name} has no turns for user and assistant")
    unproved = next(filter(None, (_unproved(messages, tokenizer, template) for messages in conversations)), "")
    if unproved:
        return CheckLine(name, "SKIP", f"sft refuses test conversations: {unproved}")
    problems = _mask_problems(conversations, tokenizer, template)
    end = tokenizer.special(template.end)
    detail = f"{template.trained_role} replies train from their first token to {end.text} ({end.id}), packed or not"
    return judged(name, problems, detail)


def _unproved(messages: Sequence[Message], tokenizer: Tokenizer, template: Template) -> str:
    """Why an imported template cannot train that conversation."""
    try:
        return chat.render(messages, tokenizer, template).unproved
    except InputError as error:
        return str(error)


def _mask_problems(conversations: Sequence[list[Message]], tokenizer: Tokenizer, template: Template) -> Iterator[str]:
    episodes = [chat.render(messages, tokenizer, template) for messages in conversations]
    for number, (episode, messages) in enumerate(zip(episodes, conversations, strict=True), 1):
        try:
            check_mask(episode, messages, tokenizer, template, f"test conversation {number}")
        except InputError as error:
            yield f"{error}: the loss mask is wrong as rendered"
    expected = [_replies(messages, tokenizer, template) for messages in conversations]
    T = sum(len(episode.ids) for episode in episodes) + 3
    for packed in (False, True):
        rows = EpisodeRows(episodes, T, packed=packed)
        (batch,) = Validation(rows, len(rows))
        for row, indices in enumerate(rows.rows):
            wanted = [reply for index in indices for reply in expected[index]]
            yield from _batch_problems(batch, row, wanted, tokenizer)


def _replies(messages: Sequence[Message], tokenizer: Tokenizer, template: Template) -> list[list[int]]:
    end = tokenizer.special(template.end).id
    return [[*tokenizer.encode(m["content"]), end] for m in messages if m["role"] == template.trained_role]


def _batch_problems(batch: Batch, row: int, wanted: list[list[int]], tokenizer: Tokenizer) -> Iterator[str]:
    """Targets against the ids they follow, then runs of trained targets against the replies."""
    ids, targets, mask, segments = (batch[name][row] for name in ("ids", "targets", "mask", "segments"))
    inside = (segments[1:] == segments[:-1]) & (mask[:-1] > 0) & (segments[1:] > 0)
    for t in np.flatnonzero(inside & (targets[:-1] != ids[1:])):
        yield (
            f"the targets are shifted: at place {t} the target is {token(tokenizer, int(targets[t]))}, "
            f"the next token is {token(tokenizer, int(ids[t + 1]))}"
        )
    if (mask[segments == 0] > 0).any():
        yield "padding has loss mask 1"
    found = _runs(targets, mask)
    if found != wanted:
        yield _misfit(found, wanted, tokenizer) + _shift(ids, mask, wanted)


def _runs(targets: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """Targets of each maximal run with mask 1."""
    edges = np.flatnonzero(np.diff([0, *(mask > 0), 0]))
    return [targets[start:stop].tolist() for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _misfit(found: list[list[int]], wanted: list[list[int]], tokenizer: Tokenizer) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} runs of tokens train, expected the {len(wanted)} replies"
    run, reply = next((f, w) for f, w in zip(found, wanted, strict=True) if f != w)
    texts = [f"{token(tokenizer, ids[0])} to {token(tokenizer, ids[-1])}" for ids in (run, reply)]
    return f"the tokens from {texts[0]} train, expected {texts[1]}"


def _shift(ids: np.ndarray, mask: np.ndarray, wanted: list[list[int]]) -> str:
    """Whether the mask fits when moved: an off-by-one between mask and targets."""
    following = np.roll(ids, -1)
    for places in (1, -1, 2, -2):
        # The last token of a conversation is only a target; its run is compared without it.
        moved = _runs(following, np.roll(mask, -places))
        if [run[: len(w) - 1] for run, w in zip(moved, wanted, strict=False)] == [w[:-1] for w in wanted]:
            return f": the loss mask is shifted by {places:+d} against the targets"
    return ": the loss mask does not fit the targets"


# -- Memorisation ----------------------------------------------------------------------


def single_batch_memorize_test(lm: LM) -> CheckLine:
    """Overfit a copy of the weights on one small batch with the real step, then answer with the real generator."""
    episodes, prompts, answers = _lesson(lm)
    trained, loss, steps = memorize(lm, episodes)
    wrong: list[str] = []
    replies = trained.generate(prompts, max_new_tokens=max(map(len, answers)))
    for prompt, reply, answer in zip(prompts, replies, answers, strict=True):
        if reply.ids != answer:
            wrong.append(f"{_shown(prompt)} gave {_text(lm, reply.ids)}, expected {_text(lm, answer)}")
    score = f"{len(prompts) - len(wrong)}/{len(prompts)} answered greedily, loss {loss:.3f} after {steps} steps"
    # Where every answer comes, it has learned them, however slowly a tiny model's loss falls.
    if wrong and not loss <= LEARNED:
        return CheckLine("single_batch_memorize_test", "FAIL", f"{score}: training does not learn one small batch")
    causes = [f"{score}: {wrong[0]}; what training learned does not come out of generation"] if wrong else []
    return judged("single_batch_memorize_test", causes, score)


def _shown(prompt: Any) -> str:
    return repr(prompt[0]["content"]) if isinstance(prompt[0], dict) else str(prompt)


def _text(lm: LM, ids: list[int]) -> str:
    return "".join(map(lm.tokenizer.token_name, ids)) if lm.tokenizer else str(ids)


Lesson = tuple[list[Rendered], list[Any], list[list[int]]]
"""Episodes to train on, prompts to give afterwards, and the ids that must come."""


def _lesson(lm: LM) -> Lesson:
    """MICRO conversations where the model can hold them, else random ids to continue."""
    if lm.tokenizer and lm.template and {"user", "assistant"} <= set(lm.template.roles):
        episodes = [chat.render(messages, lm.tokenizer, lm.template) for messages in MEMORIZED]
        fits = max(len(episode.ids) for episode in episodes) <= lm.config.max_position_embeddings
        if fits and not any(episode.unproved for episode in episodes):
            answers = [_replies(messages, lm.tokenizer, lm.template)[-1] for messages in MEMORIZED]
            return episodes, [_asked(messages, lm) for messages in MEMORIZED], answers
    return _random_lesson(lm)


def _asked(messages: list[Message], lm: LM) -> Any:
    """The prompt of the last reply, as ids where SFT would also change what the template prompts with."""
    assert lm.tokenizer
    assert lm.template
    trained = lm.template.as_trained()
    if trained == lm.template:
        return messages[:-1]
    return chat.render(messages[:-1], lm.tokenizer, trained, generation_prompt=True).ids


def _random_lesson(lm: LM) -> Lesson:
    ordinary = [id for id in range(lm.real_ids) if id not in lm.stop_ids]
    length = min(16, lm.config.max_position_embeddings)
    drawn = np.random.default_rng(0).choice(ordinary, (4, length))
    # Different beginnings, so that there is one right continuation of each.
    drawn[:, 0] = ordinary[:4] if len(ordinary) >= 4 else drawn[:, 0]
    rows: list[list[int]] = drawn.tolist()
    half = max(1, length // 2)
    episodes = [Rendered(row, [1] * length) for row in rows]
    return episodes, [row[:half] for row in rows], [row[half:] for row in rows]


def memorize(lm: LM, episodes: Sequence[Rendered], steps: int = MEMORIZE_STEPS) -> tuple[LM, float, int]:
    """A copy of the model trained on the episodes until it knows them: copy, last loss, steps taken."""
    # The wider, the smaller, as for every AdamW run at a constant rate.
    rate = min(1e-3, 0.25 / lm.config.hidden_size)
    settings = TrainSettings(steps=steps, learning_rate=rate, schedule="constant", warmup_steps=10, weight_decay=0.0)
    T = max(len(episode.ids) for episode in episodes) - 1
    batches = stacked([Validation(EpisodeRows(episodes, T, packed=False), len(episodes))[0]])
    state, loss, taken = initial_state(lm.params, settings), float("inf"), 0
    while taken < steps and not loss <= LEARNED / 2:
        state, report = train_step(_without_dropout(lm), settings, lm.compute_dtype, state, batches)
        loss, taken = float(report.loss), taken + 1
    return _with_params(lm, state.params), loss, taken


def _without_dropout(lm: LM) -> ModelConfig:
    return dataclasses.replace(lm.config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def _with_params(lm: LM, params: model.Params) -> LM:
    trained = copy.copy(lm)
    trained.params = model.cast(params, lm.compute_dtype)
    trained.generator = generate.Generator(
        lm.config,
        trained.params,
        real_ids=lm.real_ids,
        stop_ids=sorted(lm.generator.stop_ids),
        dtype=lm.generator.dtype,
    )
    return trained
