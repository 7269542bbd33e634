"""`jaxgpt tokenizer add`: a checkpoint whose tokenizer has more tokens of content, and its embedding rows for them."""

import dataclasses
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jaxgpt import chat, checkpoint
from jaxgpt.chat import Message, Template
from jaxgpt.checkpoint import Checkpoint, Contents
from jaxgpt.embedding_rows import grown
from jaxgpt.errors import InputError
from jaxgpt.jinja.template_import import CONVERSATIONS
from jaxgpt.run_lock import filling
from jaxgpt.step_folder import refuse_taken
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Addition:
    """What was added to a checkpoint."""

    ids: dict[str, int]
    """The new tokens, string to id."""
    rows_before: int
    rows: int
    """Of the embedding."""


def add(directory: str | Path, out: str | Path, texts: Sequence[str]) -> Addition:
    """Make a checkpoint with domain tokens of another; what it was trained on, it computes as before.

    Config, stage, template and every other weight are the source's; its training state
    is left behind.

    Args:
        directory: the checkpoint.
        out: the checkpoint to write, at the same step.
        texts: the new tokens, such as `<MUL_2_3_6>`; they get the next ids.

    Raises:
        InputError: OUT exists and is not empty, no tokens or no tokenizer, a text that is a
            token already, one that holds a special token, or one that stands in what the chat
            template writes.
    """
    refuse_taken(Path(out))
    if not texts:
        raise InputError("no token to add; give --token STR, or --tokens FILE with one a line")
    source = checkpoint.load(directory)
    if source.tokenizer is None:
        raise InputError(f"{directory} has no tokenizer to add tokens to; import its model with the tokenizer's files")
    tokenizer = source.tokenizer.with_added(texts)
    ids = {text: tokenizer.added[text] for text in dict.fromkeys(texts)}
    refuse_changed_prompts(source.template, tokenizer, set(ids.values()))
    with filling(Path(out)):
        checkpoint.save(out, source.step, _contents(source, source.tokenizer, tokenizer, ids)).result()
    return Addition(ids, source.config.vocab_size, tokenizer.model_vocab_size)


def _contents(source: Checkpoint, before: Tokenizer, tokenizer: Tokenizer, ids: dict[str, int]) -> Contents:
    config, rows = source.config, tokenizer.model_vocab_size
    real = [id for id in range(before.vocab_size) if before.token_bytes(id)]
    fresh = [id for id in ids.values() if id < config.vocab_size]
    return Contents(
        config=dataclasses.replace(config, vocab_size=rows),
        params=grown(source.params, config, rows, real=real, fresh=fresh),
        stage=source.stage,
        compute_dtype=source.compute_dtype,
        eos_token_ids=source.eos_token_ids,
        tokenizer=tokenizer,
        template=source.template,
        provenance={
            **{key: value for key, value in source.provenance.items() if key != "versions"},
            "parent": str(source.path),
            "added_tokens": len(ids),
            "embedding_rows": [config.vocab_size, rows],
        },
    )


def refuse_changed_prompts(template: Template | None, tokenizer: Tokenizer, new: Container[int]) -> None:
    """A new token within a template's own text would be another prompt than the one the model was trained with."""
    if template is None:
        return
    changed: list[str] = []
    for roles in dict.fromkeys([template.roles, *CONVERSATIONS.values()]):
        if not set(roles) <= set(template.roles):
            continue
        messages = [Message(role=role, content="") for role in roles]
        for generation_prompt in (False, True):
            # An imported template may not take every order of roles.
            with suppress(InputError):
                ids = chat.render(messages, tokenizer, template, generation_prompt=generation_prompt).ids
                changed += [tokenizer.token_name(id) for id in ids if id in new]
    if changed:
        raise InputError(
            f"{changed[0]} stands in what template {template.name} writes, and would change every prompt; "
            "choose another string"
        )
