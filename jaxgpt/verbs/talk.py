"""`jaxgpt generate` and `jaxgpt chat`."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError
from jaxgpt.settings import ChatSettings, GenerateSettings, GenerationSettings
from jaxgpt.verbs.conversations import read_conversations
from jaxgpt.verbs.output import Output, waiting

if TYPE_CHECKING:
    from jaxgpt.chat_session import ChatSession
    from jaxgpt.lm import LM, Piece


def generate(settings: GenerateSettings, output: Output) -> int:
    """Continue each prompt; one prompt is streamed, several are a batch."""
    prompts = _prompts(settings)
    _check(settings.generation, output)
    lm = _load(settings, output)
    chosen = settings.generation
    if settings.messages:
        _refuse_answered(prompts, settings.messages, lm)
    # A --config may have said it as well, and is told of what does not fit.
    if "--max-new-tokens" not in output.given and chosen.max_new_tokens == GenerationSettings.max_new_tokens:
        chosen = _within_context(lm, prompts, chosen)
    if len(prompts) == 1 and lm.tokenizer and not output.json:
        print_pieces(lm.stream(prompts[0], **_fields(chosen)), output)
    else:
        _batch(lm, prompts, chosen, output)
    return 0


def _prompts(settings: GenerateSettings) -> list[Any]:
    kinds = [bool(settings.prompts), bool(settings.messages), bool(settings.ids)]
    if sum(kinds) != 1:
        got = "several of them" if any(kinds) else "none of them"
        raise InputError(
            f'expected prompts, --messages FILE or --ids, got {got}; for example `jaxgpt generate DIR "def "`'
        )
    if settings.messages:
        return list(read_conversations(settings.messages))
    return [_ids(text) for text in settings.ids] or list(settings.prompts)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--ids must be integers, got {text!r}; write --ids 464,2068") from None


def _refuse_answered(conversations: list[Any], file: str, lm: "LM") -> None:
    role = lm.template.trained_role if lm.template else "assistant"
    for number, messages in enumerate(conversations, start=1):
        if messages[-1].get("role") == role:
            raise InputError(f"{file}: conversation {number} ends with the {role}; end it with a message to answer")


def _within_context(lm: "LM", prompts: list[Any], chosen: GenerationSettings) -> GenerationSettings:
    """The tokens that nobody asked for are no more than the context leaves after the longest prompt."""
    left = lm.config.max_position_embeddings - max(len(lm.encode(prompt)) for prompt in prompts)
    return dataclasses.replace(chosen, max_new_tokens=max(1, min(chosen.max_new_tokens, left)))


def _batch(lm: "LM", prompts: list[Any], chosen: GenerationSettings, output: Output) -> None:
    for number, (prompt, done) in enumerate(
        zip(prompts, lm.generate(prompts, **_fields(chosen)), strict=True), start=1
    ):
        if output.json:
            output.result({"prompt": prompt, **_given(dataclasses.asdict(done))})
        else:
            head = f"[{number}/{len(prompts)}]\n" if len(prompts) > 1 else ""
            output.say(head + (done.text if lm.tokenizer else ",".join(map(str, done.ids))))


def chat(settings: ChatSettings, output: Output) -> int:
    """One reply, or a conversation."""
    from jaxgpt.chat_session import ChatSession
    from jaxgpt.verbs.repl import Repl

    _check(settings.generation, output)
    lm = _load(settings, output)
    raw = settings.raw or (lm.stage == "base" and not settings.chat)
    chosen = dataclasses.replace(settings.generation, temperature=0.0) if settings.greedy else settings.generation
    if raw and settings.system:
        raise InputError(f"--system needs the chat template, {settings.directory} is a base model; add --chat")
    session = ChatSession(lm, system=settings.system or None, settings=chosen, raw=raw)
    if raw and not settings.raw:
        output.note("a base model continues text, it was not taught to answer; --chat uses its template all the same")
    if session.template and session.template.warning:
        output.note(session.template.warning)
    if settings.message is None:
        return Repl(session, output).run()
    _replies(session, settings, settings.message, output)
    return 0


def _replies(session: "ChatSession", settings: ChatSettings, message: str, output: Output) -> None:
    for number in range(settings.num_samples):
        chosen = dataclasses.replace(session.settings, seed=settings.generation.seed + number)
        session.configure(chosen)
        pieces = session.regenerate() if number else session.send(message)
        if not output.json and settings.num_samples > 1:
            output.say(f"[{number + 1}/{settings.num_samples}]")
        reply(pieces, output, message=message, seed=chosen.seed)


def reply(pieces: "Iterable[Piece]", output: Output, **also: Any) -> str:
    """Print a reply as it comes, or as one JSON object with `also`; returns why it ended."""
    if not output.json:
        return print_pieces(pieces, output)
    text, ids, reason = "", list[int](), ""
    logprobs: list[float] | None = None
    for piece in pieces:
        text += piece.text
        ids += piece.ids
        logprobs = logprobs if piece.logprobs is None else [*(logprobs or ()), *piece.logprobs]
        reason = piece.stop_reason or reason
    output.result({**also, **_given({"text": text, "ids": ids, "stop_reason": reason, "logprobs": logprobs})})
    return reason


def print_pieces(pieces: "Iterable[Piece]", output: Output) -> str:
    """Text as it comes, then a line break; returns why it ended."""
    reason = ""
    for piece in pieces:
        output.say(piece.text, end="")
        reason = piece.stop_reason or reason
    output.say()
    return reason


def _given(result: dict[str, Any]) -> dict[str, Any]:
    """Without log-probabilities that nobody asked for."""
    return {name: value for name, value in result.items() if name != "logprobs" or value is not None}


def _check(chosen: GenerationSettings, output: Output) -> None:
    if chosen.logprobs and not output.json:
        raise InputError("--logprobs are printed as JSON only; add --json")
    note_ignored(chosen, output)


def note_ignored(chosen: GenerationSettings, output: Output) -> None:
    """Say which settings do nothing because the draw is greedy."""
    ignored = chosen.ignored_by_greedy
    if ignored:
        output.note(f"temperature 0 is greedy and ignores {', '.join(ignored)}; a temperature above 0 uses them")


def _fields(chosen: GenerationSettings) -> dict[str, Any]:
    return {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}


def _load(settings: GenerateSettings | ChatSettings, output: Output) -> "LM":
    from jaxgpt.loading import load

    with waiting("loading"):
        loaded = load(settings.directory, device=settings.device, compute_dtype=settings.compute_dtype)
    if output.settings.debug:
        names = (f"{i} {loaded.tokenizer.token_name(i) if loaded.tokenizer else ''}" for i in loaded.stop_ids)
        output.note(f"stop tokens: {', '.join(names) or 'none'}; compute dtype: {loaded.compute_dtype}")
    return loaded
