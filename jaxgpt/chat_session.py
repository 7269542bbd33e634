"""A conversation with a model in which nothing is tokenised or computed twice.

The session holds the ids the model has read; each turn appends only the new
message and the reply. A reply that was cut off (length, stop text, the user) is
closed as if it had ended by itself, so the next turn sees a well-formed
conversation.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from jaxgpt import cache as kv
from jaxgpt import chat
from jaxgpt.chat import Message, Template
from jaxgpt.errors import InputError
from jaxgpt.generate import Conversation
from jaxgpt.lm import LM, Piece, Reply
from jaxgpt.settings import GenerationSettings
from jaxgpt.text_stream import TextStream
from jaxgpt.tokenizer import Tokenizer

CHUNK = 4
"""Tokens between two pieces of a reply: how soon it is seen and can be stopped."""


class _Turn(NamedTuple):
    """What `regenerate` returns to."""

    text: str
    ids: int
    messages: int


class ChatSession:
    """A conversation that grows turn by turn.

    With `raw` there is no template: messages and replies are one running text.

    Attributes:
        ids: everything said so far, system message and turn markers included. After a
            reply that ended by itself they are those of `chat.render(messages)`, unless an
            imported template renders old turns otherwise than new ones.
        messages: the same as text.
        conversation: the cache that has read `ids`, but for the last turn's closing.
    """

    def __init__(
        self, lm: LM, *, system: str | None = None, settings: GenerationSettings | None = None, raw: bool = False
    ):
        """Raises InputError: no tokenizer, or no template that knows a system message."""
        if lm.tokenizer is None:
            raise InputError(
                "the checkpoint has no tokenizer jaxgpt knows; it can only be used with token ids: "
                "jaxgpt generate DIRECTORY --ids 1,2,3"
            )
        if lm.template is None and not raw:
            raise InputError("the checkpoint has no chat template; use --raw to continue text")
        self.lm = lm
        self.tokenizer: Tokenizer = lm.tokenizer
        self.template: Template | None = None if raw else lm.template
        self.settings = settings or GenerationSettings()
        self._suffix = chat.closing(self.tokenizer, self.template) if self.template else []
        self.restart(system)

    @property
    def limit(self) -> int:
        """The model's context in tokens."""
        return self.lm.config.max_position_embeddings

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.limit - len(self.ids) - len(self._suffix)

    def restart(self, system: str | None = None) -> None:
        """Forget everything; a new conversation, with another system message or none."""
        opening = [Message(role="system", content=system)] if system else []
        self._open(opening)

    def load(self, messages: Sequence[Message]) -> None:
        """Go on with a saved conversation; raises InputError if it does not end with a reply."""
        role = self.template.trained_role if self.template else "assistant"
        if not messages or messages[-1]["role"] != role:
            raise InputError(f"a conversation to go on with ends with a message of the {role}")
        self._open(messages)

    def _open(self, messages: Sequence[Message]) -> None:
        ids: list[int] = []
        if messages and self.template:
            ids = chat.opened(messages, self.tokenizer, self.template)
        elif messages:
            ids = [id for message in messages for id in self.tokenizer.encode(message["content"])]
        if len(ids) > self.limit:
            raise InputError(f"the conversation is {len(ids):,} tokens; limit {self.limit:,}")
        self.ids = ids
        self.messages = list(messages)
        self._turn: _Turn | None = None
        cache = kv.empty(self.lm.config, 1, kv.bucket(1), self.lm.compute_dtype)
        self.conversation = Conversation(self.lm.generator, cache, self.settings, [self.settings.seed])

    def configure(self, settings: GenerationSettings) -> None:
        """Other sampling settings from the next reply on; what was read stays read."""
        self.settings = settings
        self.conversation.configure(settings, [settings.seed])

    def send(self, text: str) -> Generator[Piece]:
        """One turn: the reply to `text`, piece by piece.

        Closing the iterator early stops the reply and keeps what was said. The reply
        is as long as the settings allow and the context holds.

        Raises:
            InputError: before anything changes, if the message does not fit or cannot
                be encoded.
        """
        new = self._opening(text)
        budget = min(self.settings.max_new_tokens, self.room - len(new))
        if budget < 1:
            remedy = "start over" if self.room < 2 else "start over, or shorten the message"
            raise InputError(
                f"the conversation is {len(self.ids):,} tokens and this message adds {len(new):,}; "
                f"limit {self.limit:,}; {remedy}"
            )
        self._turn = _Turn(text, len(self.ids), len(self.messages))
        return self._reply(text, new, budget)

    def regenerate(self) -> Generator[Piece]:
        """The last reply again; raises InputError if there is none yet."""
        turn = self._turn
        if turn is None:
            raise InputError("there is no reply to generate again; send a message first")
        del self.ids[turn.ids :], self.messages[turn.messages :]
        self.conversation.forget([min(self._read, turn.ids)])
        return self.send(turn.text)

    @property
    def has_reply(self) -> bool:
        """There is a reply of this session to generate again."""
        return self._turn is not None

    @property
    def _read(self) -> int:
        """Ids the cache holds."""
        return int(self.conversation.lengths[0])

    def _opening(self, text: str) -> list[int]:
        """Ids from the end of the last turn to the beginning of the reply."""
        if self.template:
            messages = [Message(role="user", content=text)]
            return chat.following(self.messages, messages, self.tokenizer, self.template)
        ids = self.tokenizer.encode(text)
        return ids if ids or self.ids else [self.tokenizer.special("end_of_text").id]

    def _reply(self, text: str, new: list[int], budget: int) -> Generator[Piece]:
        self.ids += new
        self.messages.append(Message(role="user", content=text))
        stop = (*self.settings.stop, *(self.template.stop_strings if self.template else ()))
        reply = Reply(self.tokenizer, stop, self.lm.stop_ids)
        shown = ""
        try:
            self._prefill()
            for piece in reply.pieces(self.conversation.chunks([budget], CHUNK)):
                shown += piece.text
                yield piece
        finally:
            self._close(reply, shown + reply.finish())

    def _prefill(self) -> None:
        """Let the model read what it has not."""
        if self.conversation.logits is None:
            # Nothing to draw the next id from: the last one at least is read again.
            self.conversation.forget([min(self._read, len(self.ids) - 1)])
        unread = self.ids[self._read :]
        if unread:
            self.conversation.append([unread])

    def _close(self, reply: Reply, content: str) -> None:
        """Leave a well-formed conversation, however the reply ended."""
        kept = reply.ids
        if reply.reason == "stop_text":
            kept = _ids_of_shown(kept, content, self.tokenizer)
        elif reply.reason == "stop_token" and self.template:
            # Whichever end it was, the template's closes the turn.
            kept = kept[:-1]
        self.ids += [*kept, *self._suffix]
        self.messages.append(Message(role="assistant", content=content))
        self._forget_surplus(reply, kept)

    def _forget_surplus(self, reply: Reply, kept: list[int]) -> None:
        """The cache keeps what `ids` also has: all of a turn that ended properly."""
        before = len(self.ids) - len(self._suffix) - len(kept)
        same = sum(1 for _ in _common(self.ids[before:], reply.ids))
        if self._read > before + same:
            self.conversation.forget([before + same])


def _common(a: Sequence[int], b: Sequence[int]) -> Iterator[int]:
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def _ids_of_shown(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids whose text is exactly `text`, the beginning of that of `ids`.

    Where a token holds both the end of `text` and the beginning of the stop text,
    the end is encoded anew.
    """
    stream = TextStream(tokenizer)
    length = covered = kept = 0
    for count, id in enumerate(ids, start=1):
        new = stream.push(id)
        length += len(new)
        if length > len(text):
            break
        if new:
            kept, covered = count, length
    return [*ids[:kept], *tokenizer.encode(text[covered:])]
