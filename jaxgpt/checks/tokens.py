"""The tokenizer as the model knows it: special tokens, their ids, and where replies end."""

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import chat, model
from jaxgpt.chat import Message, Template
from jaxgpt.checks.parity import LENGTHS, conversation_of
from jaxgpt.checks.report import CheckLine, judged, token
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, validation
from jaxgpt.data.instructions import MICRO
from jaxgpt.lm import LM, Reply
from jaxgpt.loss import token_losses
from jaxgpt.settings import GenerationSettings
from jaxgpt.text_stream import TextStream
from jaxgpt.tokenizer import Special, Tokenizer

TEXTS = (
    "Say OK.",
    " leading, trailing \n\n\ttabs ",
    "def f(x: int = 0) -> str:\n    return f'{x!r}'\n",
    "3.14159 1,234,567 0x1f",
    "naïve café, Ωmega, e\u0301",
    "日本語 中文 한국어",
    "🙂👩‍👩‍👧 x🙂y",
)
EPISODES = MICRO[::2]
"""Conversations whose likelihood tells which id the model was taught for which special token."""
DECISIVE = float(np.log(10.0))
"""Nats by which every conversation must prefer other ids: ten times likelier, in each of them."""

# -- Text to ids and back --------------------------------------------------------------


def tokenizer_self_test(lm: LM) -> CheckLine:
    """Specials are one id each, text returns as it was, and what a user types is never a control token."""
    name, tokenizer = "tokenizer_self_test", lm.tokenizer
    if tokenizer is None:
        return CheckLine(name, "SKIP", "the checkpoint has no tokenizer")
    problems = itertools.chain(
        _special_problems(tokenizer),
        _text_problems(tokenizer),
        _user_text_problems(tokenizer, lm.template) if lm.template else (),
    )
    detail = f"{len(tokenizer.specials)} special tokens are one id each; {len(TEXTS)} texts return unchanged"
    return judged(name, problems, detail + "; user text gives no control token")


def _special_problems(tokenizer: Tokenizer) -> Iterator[str]:
    for special in tokenizer.specials:
        alone = tokenizer.encode(special.text, specials=True)
        if alone != [special.id]:
            yield f"{special.text} encodes to {alone}, expected its one id {special.id}"
        if tokenizer.decode([special.id]) != special.text:
            yield f"id {special.id} decodes to {tokenizer.decode([special.id])!r}, expected {special.text}"
    mixed = "".join(f"{special.text}Say OK." for special in tokenizer.specials)
    found = [id for id in tokenizer.encode(mixed, specials=True) if id in tokenizer.special_ids]
    if found != [special.id for special in tokenizer.specials]:
        yield f"mixed text {mixed!r} gives special ids {found}, expected one of each in order"


def _text_problems(tokenizer: Tokenizer) -> Iterator[str]:
    for text in (*TEXTS, *(special.text for special in tokenizer.specials)):
        ids = tokenizer.encode(text)
        expected = tokenizer.normalise(text)
        if tokenizer.decode(ids) != expected:
            yield f"{text!r} returns as {tokenizer.decode(ids)!r}"
        control = [id for id in ids if id in tokenizer.special_ids]
        if control:
            yield f"ordinary text {text!r} gives the control token {token(tokenizer, control[0])}"
        stream = TextStream(tokenizer)
        pieces = [*map(stream.push, ids), stream.finish()]
        if "".join(pieces) != expected:
            yield f"{text!r} streams as {''.join(pieces)!r}"
    for id in range(tokenizer.vocab_size, tokenizer.model_vocab_size):
        if tokenizer.decode([id]):
            yield f"id {id} is padding of the embedding, but decodes to {tokenizer.decode([id])!r}"


def _user_text_problems(tokenizer: Tokenizer, template: Template) -> Iterator[str]:
    """Control tokens of a conversation must not depend on what its messages say."""
    for role, special in itertools.product(template.roles, tokenizer.specials):
        plain, typed = (
            [i for i in _turn(role, text, tokenizer, template) if i in tokenizer.special_ids]
            for text in ("OK", f" {special.text}OK")
        )
        if typed != plain:
            yield f"a {role} message that contains {special.text} renders with control tokens {typed}, not {plain}"


def _turn(role: str, content: str, tokenizer: Tokenizer, template: Template) -> list[int]:
    """A conversation with that message; imported templates want them in the usual order."""
    before = {"assistant": ("user",), "tool": ("user", "assistant")}
    roles = (*before[role], role) if role in before else (role,) if role == "user" else (role, "user")
    if not {*roles} <= {*template.roles}:
        roles = (role,)
    messages = [Message(role=each, content=content if each == role else "OK") for each in roles]
    return chat.render(messages, tokenizer, template).ids


# -- Special ids -----------------------------------------------------------------------


def special_token_id_stability_test(lm: LM) -> CheckLine:
    """The ids in use are those saved, those the template asks for, and those the model was taught.

    A fine-tuned model is asked which ids it was taught: were another assignment right,
    short conversations read with it would be far likelier, their end tokens above all.
    What cannot be seen: an exchange of tokens that the model was never taught to
    produce and reads alike, such as two unused roles; and, in a base model, any
    exchange that all saved maps agree on.
    """
    name, tokenizer, template = "special_token_id_stability_test", lm.tokenizer, lm.template
    if tokenizer is None:
        return CheckLine(name, "SKIP", "the checkpoint has no tokenizer")
    taught = lm.stage != "base" and template is not None and _episodes_fit(lm, tokenizer, template)
    problems = itertools.chain(
        _saved_problems(tokenizer, lm.config),
        _template_problems(tokenizer, template) if template else (),
        _taught_problems(lm, tokenizer, template) if taught and template else (),
    )
    ids = ", ".join(f"{special.text} {special.id}" for special in tokenizer.specials)
    how = "saved, asked for by the template, and taught" if taught else "saved and asked for by the template"
    return judged(name, problems, f"{ids}: as {how}" + ("" if taught else f" (a {lm.stage} model is not asked)"))


def _saved_problems(tokenizer: Tokenizer, config: ModelConfig) -> Iterator[str]:
    restored = Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())), config.vocab_size)
    if restored.specials != tokenizer.specials:
        yield f"special tokens {_names(tokenizer.specials)} load again as {_names(restored.specials)}"
    if tokenizer.vocab_size > config.vocab_size:
        yield f"the tokenizer has {tokenizer.vocab_size} ids, the model embeds {config.vocab_size}"


def _names(specials: Sequence[Special]) -> str:
    return ", ".join(f"{special.name}={special.id} {special.text}" for special in specials)


def _template_problems(tokenizer: Tokenizer, template: Template) -> Iterator[str]:
    of_name = {special.name: special for special in tokenizer.specials}
    for name, text in template.specials.items():
        special = of_name.get(name)
        if special is None:
            yield f"template {template.name} needs {name}, the tokenizer has {_names(tokenizer.specials)}"
        elif special.text != text:
            yield (
                f"special ids are permuted: {name} is {special.text} with id {special.id}, "
                f"template {template.name} means {text}"
            )


def _episodes_fit(lm: LM, tokenizer: Tokenizer, template: Template) -> bool:
    longest = max(len(chat.render(messages, tokenizer, template).ids) for messages in EPISODES)
    return longest <= lm.config.max_position_embeddings + 1


def _taught_problems(lm: LM, tokenizer: Tokenizer, template: Template) -> Iterator[str]:
    """An exchange of two special tokens under which every conversation is far likelier, and ends as taught."""
    episodes = [chat.render(messages, tokenizer, template) for messages in EPISODES]
    batch = validation(episodes, len(episodes), max(len(e.ids) for e in episodes) - 1, packed=False)[0]
    saved, _ = _nats(lm, batch)
    used = {int(id) for id in np.unique([batch["ids"], batch["targets"]])}
    for a, b in itertools.combinations(tokenizer.specials, 2):
        if not used & {a.id, b.id}:
            continue
        exchanged, ends = _nats(lm, _exchanged(batch, a.id, b.id))
        # A model that was taught nothing prefers this or that by chance, but is sure of no end.
        if (saved - exchanged).min() > DECISIVE and np.median(ends) < np.log(2.0):
            yield (
                f"special ids are permuted: with {a.text} ({a.id}) and {b.text} ({b.id}) exchanged, the loss of "
                f"{len(episodes)} short conversations falls from {saved.mean():.2f} to {exchanged.mean():.2f} nats each"
            )


def _exchanged(batch: Batch, a: int, b: int) -> Batch:
    changed = batch.copy()
    for name in ("ids", "targets"):
        array = batch[name]
        changed[name] = np.where(array == a, b, np.where(array == b, a, array))
    return changed


def _nats(lm: LM, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of each conversation: loss of its trained tokens, summed, and loss of the last, its end token."""
    losses = _losses(lm.config, lm.params, jnp.asarray(batch["ids"]), jnp.asarray(batch["targets"]))
    losses, mask = np.asarray(losses, np.float64), batch["mask"]
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return (losses * mask).sum(axis=1), losses[np.arange(len(mask)), last]


@partial(jax.jit, static_argnames="config")
def _losses(config: ModelConfig, params: model.Params, ids: jax.Array, targets: jax.Array) -> jax.Array:
    return token_losses(model.forward(config, params, ids).logits, targets)


# -- Stop tokens -----------------------------------------------------------------------


def stop_token_test(lm: LM, eos_token_ids: Sequence[int] = ()) -> CheckLine:
    """Generation stops at the ids the tokenizer and `eos_token_ids` (the generation config's) name, and only there."""
    name, tokenizer = "stop_token_test", lm.tokenizer
    template_end = {tokenizer.special(lm.template.end).id} if tokenizer and lm.template else set[int]()
    wanted = sorted({*(tokenizer.stop_ids if tokenizer else ()), *template_end, *eos_token_ids})
    if not wanted:
        return CheckLine(name, "SKIP", "the checkpoint has no tokenizer and names no end token")
    problems = itertools.chain(
        _end_token_problems(tokenizer, lm.template, wanted) if tokenizer and lm.template else (),
        _stop_id_problems(lm, wanted),
        _stopping_problems(lm, wanted),
    )
    return judged(name, problems, f"generation stops at {', '.join(token(tokenizer, id) for id in wanted)} only")


def _end_token_problems(tokenizer: Tokenizer, template: Template, wanted: Sequence[int]) -> Iterator[str]:
    text = template.specials.get(template.end, tokenizer.special(template.end).text)
    ids = tokenizer.encode(text, specials=True)
    if len(ids) != 1 or ids[0] not in wanted:
        stops = ", ".join(token(tokenizer, id) for id in wanted)
        yield f"template {template.name} ends a turn with {text}, which encodes to {ids}; the stop ids are {stops}"


def _stop_id_problems(lm: LM, wanted: Sequence[int]) -> Iterator[str]:
    if lm.tokenizer:
        for id in set(wanted) - lm.tokenizer.special_ids:
            yield f"stop id {token(lm.tokenizer, id)} is no special token of this tokenizer: it is hard-coded or moved"
    stops = np.asarray(lm.generator.vocabulary.stops)
    for place, ids in (
        ("the loaded model", sorted(lm.stop_ids)),
        ("the generator", sorted(lm.generator.stop_ids)),
        ("the decode loop", np.flatnonzero(stops).tolist()),
    ):
        if ids != wanted:
            yield (
                f"{place} stops at {_tokens(lm, ids)}, but the tokenizer and generation config name "
                f"{_tokens(lm, wanted)}: a stop id is hard-coded or moved"
            )


def _tokens(lm: LM, ids: Sequence[int]) -> str:
    return ", ".join(token(lm.tokenizer, id) for id in ids) or "nothing"


def _stopping_problems(lm: LM, wanted: Sequence[int]) -> Iterator[str]:
    """Make every row's next id certain and see which rows the real decode loop ends."""
    other = next((id for id in range(lm.real_ids) if id not in wanted), None)
    if other is None or lm.config.max_position_embeddings < 3:
        return
    # As many rows as the other checks have, so that nothing new compiles.
    forced = [*wanted, *[other] * max(1, len(LENGTHS) - len(wanted))]
    conversation = conversation_of(lm.generator, len(forced), 3, GenerationSettings())
    conversation.append([[other]] * len(forced))
    certain = np.zeros((conversation.cache.lengths.shape[0], lm.config.vocab_size), np.float32)
    certain[np.arange(len(forced)), forced] = 1.0
    conversation.logits = jnp.asarray(certain)
    ids: list[list[int]] = [[] for _ in forced]
    for chunk in conversation.generate([2] * len(forced)):
        for row, new in zip(ids, chunk, strict=True):
            row += new
    for id, row in zip(wanted, ids, strict=False):
        if row != [id]:
            yield f"after the stop token {token(lm.tokenizer, id)} generation goes on with {row[1:]}"
        if _printed(lm, row):
            yield f"the stop token {token(lm.tokenizer, id)} is printed in the reply as {_printed(lm, row)!r}"
    if len(ids[-1]) != 2:
        yield f"generation stops at {token(lm.tokenizer, other)}, which is no stop token"


def _printed(lm: LM, ids: Sequence[int]) -> str:
    reply = Reply(lm.tokenizer, (), lm.stop_ids)
    return reply.push(ids) + reply.finish()
