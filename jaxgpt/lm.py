"""The Python API: `lm = jaxgpt.load(DIR)`, then `lm.logits(ids)` and `lm.generate(prompts)`."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxgpt import chat, generate, model
from jaxgpt.buckets import Buckets
from jaxgpt.chat import Message, Template
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.settings import GenerationSettings
from jaxgpt.step_folder import DTYPES
from jaxgpt.text_stream import TextStream
from jaxgpt.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (encoded as ordinary text), token ids, or messages (rendered by the chat template)."""
StopReason = Literal["stop_token", "stop_text", "length"]


@dataclass(frozen=True)
class Completion:
    """What the model added to a prompt."""

    prompt_ids: list[int]
    ids: list[int]
    """Generated ids, a stop token included."""
    text: str
    """Without special tokens, and without the stop text."""
    stop_reason: StopReason
    logprobs: list[float] | None = None
    """The model's log-probability of each of `ids`, before any setting changes it; None unless asked for."""


@dataclass(frozen=True)
class Piece:
    """A part of a completion while it is being generated."""

    text: str
    ids: list[int]
    """The new ids since the last piece; their text may still be held back."""
    stop_reason: StopReason | None = None
    """Set on the last piece."""
    logprobs: list[float] | None = None
    """Of `ids`; None unless asked for."""


class LM:
    """A loaded model with its tokenizer and chat template, on the device, in its compute dtype."""

    def __init__(self, checkpoint: Checkpoint, *, compute_dtype: str | None = None):
        """`compute_dtype` overrides the one the checkpoint was last trained in; InputError for an unknown one."""
        if compute_dtype is not None and compute_dtype not in DTYPES:
            raise InputError(f"compute_dtype must be one of {', '.join(DTYPES)}; got {compute_dtype!r}")
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer
        self.template: Template | None = checkpoint.template
        self.stage: str = checkpoint.stage
        self.compute_dtype: str = compute_dtype or checkpoint.compute_dtype
        self.params = model.cast(checkpoint.params, self.compute_dtype)
        self.stop_ids = self._stop_ids(checkpoint)
        self.real_ids = self.tokenizer.vocab_size if self.tokenizer else self.config.vocab_size
        self.generator = generate.Generator(
            self.config, self.params, real_ids=self.real_ids, stop_ids=self.stop_ids, dtype=self.compute_dtype
        )

    def _stop_ids(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Every end the tokenizer, the template and the generation config name; never a literal id."""
        own = {*self.tokenizer.stop_ids} if self.tokenizer else set[int]()
        if self.tokenizer and self.template:
            own.add(self.tokenizer.special(self.template.end).id)
        return tuple(sorted({*own, *checkpoint.eos_token_ids}))

    def logits(self, ids: Any) -> Float[np.ndarray, "B T V"]:
        """Logits of whole sequences.

        Args:
            ids: (B, T) ints, each in [0, V).

        Raises:
            InputError: another shape, an id outside the vocabulary, or T beyond the context.
        """
        array = _array(ids)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
            raise InputError(f"ids must be (B, T) integers, got {array.dtype} of shape {array.shape}")
        self._check_range(array)
        if array.shape[1] > self.config.max_position_embeddings:
            raise InputError(f"{array.shape[1]:,} tokens; the context holds {self.config.max_position_embeddings:,}")
        return np.asarray(_logits(self.config, self.params, jnp.asarray(array, jnp.int32)), np.float32)

    def _check_range(self, ids: np.ndarray) -> None:
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if outside.size:
            raise InputError(f"token {outside[0]} outside vocabulary 0–{self.config.vocab_size - 1}")

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as ids: text is ordinary text, messages go through the template.

        Raises:
            InputError: text or messages without a tokenizer, messages without a template, or something
                that is none of text, ids and messages.
        """
        if isinstance(prompt, str):
            tokenizer = self._tokenizer("a text prompt")
            # Training text starts after an end of text; so does an empty prompt.
            return [*tokenizer.bos_ids, *tokenizer.encode(prompt)] or [tokenizer.special("end_of_text").id]
        if _is_conversation(prompt):
            if self.template is None:
                raise InputError("the checkpoint has no chat template; give text or ids instead of messages")
            tokenizer = self._tokenizer("a conversation")
            messages: Any = prompt
            return chat.render(messages, tokenizer, self.template, generation_prompt=True).ids
        array = _array(prompt)
        # NumPy has no integer for an id of 20 digits; it is refused as any id outside the vocabulary is.
        if array.ndim != 1 or not all(type(i) is int for i in array.tolist()):
            what = type(prompt).__name__
            raise InputError(f"a prompt must be text, a list of token ids, or a list of messages; got {what}")
        return array.tolist()

    def _tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"the checkpoint has no tokenizer, so {what} cannot be encoded; give token ids")
        return self.tokenizer

    def _settings(self, changes: dict[str, Any]) -> GenerationSettings:
        known = {field.name: field.default for field in dataclasses.fields(GenerationSettings)}
        for name, value in changes.items():
            if name not in known:
                raise InputError(f"generate has no setting {name!r}; it takes {', '.join(known)}")
            if name == "logprobs":
                changes[name] = _truth(name, value)
            elif name != "stop" and not (name == "temperature" and value is None):
                changes[name] = _number(name, value, type(known[name]))
        # As everywhere, no temperature is greedy.
        changes["temperature"] = changes.get("temperature") or 0.0
        stop = _texts(changes.pop("stop", None))
        if stop and self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, so a stop text cannot be seen; drop stop")
        return GenerationSettings(stop=stop, **changes)

    def _reply(self, prompt: Prompt, settings: GenerationSettings) -> "Reply":
        """What the answer to `prompt` is collected in; a conversation also ends where its template says."""
        template = self.template if _is_conversation(prompt) else None
        return Reply(self.tokenizer, settings.stop + (template.stop_strings if template else ()), self.stop_ids)

    def generate(self, prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[Completion]:
        """Complete a batch of prompts; prompts of different lengths do not influence each other.

        Args:
            prompts: one prompt or a list of them; see `Prompt`.
            settings: fields of `GenerationSettings`: max_new_tokens, temperature, top_k, top_p, min_p,
                repetition_penalty, no_repeat_ngram_size, seed, stop, logprobs.

        Raises:
            InputError: a bad setting, a prompt that cannot be encoded, or one that would outgrow the context.
        """
        chosen = self._settings(settings)
        listed = _as_list(prompts)
        encoded = [self.encode(prompt) for prompt in listed]
        rows = [generate.Row(ids, chosen.max_new_tokens, chosen.seed) for ids in encoded]
        replies = [self._reply(prompt, chosen) for prompt in listed]
        for chunk in self.generator.chunks(rows, chosen):
            for reply, ids, logprobs in zip(replies, chunk.ids, _by_row(chunk), strict=True):
                reply.push(ids, logprobs)
            if all(reply.ended for reply in replies):
                break
        return [
            Completion(ids, reply.ids, reply.text + reply.finish(), reply.reason, _asked(chosen, reply.logprobs))
            for ids, reply in zip(encoded, replies, strict=True)
        ]

    def stream(self, prompt: Prompt, *, chunk: int = 4, **settings: Any) -> Iterator[Piece]:
        """Complete one prompt, piece by piece, as it is generated; see `generate`.

        `chunk` is the number of tokens between two pieces.
        """
        chosen = self._settings(settings)
        row = generate.Row(self.encode(prompt), chosen.max_new_tokens, chosen.seed)
        reply = self._reply(prompt, chosen)
        yield from reply.pieces(self.generator.chunks([row], chosen, chunk))

    def warm_up(self, *, batch: int = 1, prompt: int | None = None, tokens: int | None = None) -> Buckets:
        """Compile now what generation will need, so that no later call waits for it.

        Args:
            batch: most prompts of a call.
            prompt: most tokens of a prompt; all there are unless given.
            tokens: most tokens of prompt and reply together; the context unless given.

        Returns:
            The sizes it covers; printed, they say how many programs that is at most.

        Raises:
            InputError: a number below 1, a prompt longer than all tokens, or more than the context holds.
        """
        tokens = self.config.max_position_embeddings if tokens is None else tokens
        buckets = Buckets.upto(batch, tokens if prompt is None else prompt, tokens)
        self.generator.warm_up(buckets)
        return buckets


class Reply:
    """Ids becoming text: decodes, finds stop texts, knows why generation ended."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_ids: Sequence[int]):
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        """Of each of `ids`, as far as they were given."""
        self.text = ""
        self._stream = TextStream(tokenizer, stop) if tokenizer else None
        self._stop_ids = frozenset(stop_ids)

    @property
    def ended(self) -> bool:
        """A stop token or stop text was seen."""
        return self.reason != "length"

    @property
    def reason(self) -> StopReason:
        """Why generation ended, or would if it ended now."""
        if self._stream and self._stream.stopped is not None:
            return "stop_text"
        return "stop_token" if self.ids and self.ids[-1] in self._stop_ids else "length"

    def push(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> str:
        """Take new ids until the end; the text that is safe to print now."""
        new, before = "", len(self.ids)
        for i in ids:
            if self.ended:
                break
            self.ids.append(i)
            new += self._stream.push(i) if self._stream else ""
        self.logprobs += list(logprobs or ())[: len(self.ids) - before]
        self.text += new
        return new

    def finish(self) -> str:
        """Text that was held back."""
        return self._stream.finish() if self._stream else ""

    def pieces(self, chunks: Iterator[generate.Chunk]) -> Iterator[Piece]:
        """The pieces of a batch of one."""
        for chunk in chunks:
            before = len(self.ids)
            (logprobs,) = _by_row(chunk)
            text = self.push(chunk.ids[0], logprobs)
            yield Piece(text, self.ids[before:], logprobs=None if logprobs is None else self.logprobs[before:])
            if self.ended:
                break
        yield Piece(self.finish(), [], self.reason)


def _by_row(chunk: generate.Chunk) -> Sequence[list[float] | None]:
    return chunk.logprobs if chunk.logprobs is not None else [None] * len(chunk.ids)


def _asked(settings: GenerationSettings, logprobs: list[float]) -> list[float] | None:
    return logprobs if settings.logprobs else None


def _array(ids: Any) -> np.ndarray:
    try:
        return np.asarray(ids)
    except ValueError:
        raise InputError("rows of ids differ in length; give (B, T) integers, or one prompt after another") from None


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], dict)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt (text, ids or messages) as a list of one; the rows of an array are prompts."""
    if isinstance(prompts, list | tuple):
        single = not prompts or isinstance(prompts[0], int | np.integer | dict)
        return [prompts] if single else list(prompts)
    return list(prompts) if np.ndim(prompts) == 2 else [prompts]


def _number(name: str, value: Any, kind: type) -> Any:
    """The value as an int or a float; numpy's are taken, a fraction is not rounded."""
    allowed = int | np.integer if kind is int else int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, allowed):
        what = "an integer" if kind is int else "a number"
        raise InputError(f"{name} must be {what}, got {value!r}")
    return kind(value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _texts(stop: Any) -> tuple[str, ...]:
    """One stop text, several or none."""
    texts: Any = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"stop must be a text or a list of texts, got {stop!r}")
    return tuple(texts)


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: model.Params, ids: jax.Array) -> jax.Array:
    return model.forward(config, params, ids).logits
