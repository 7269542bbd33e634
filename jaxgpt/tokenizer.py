"""Text to ids and back: one Tokenizer, its kinds, and its state.

A tokenizer is a base vocabulary (its kind) plus special tokens that only a
template may emit. Ids run: base vocabulary, special tokens added by jaxgpt, then
rows that mean nothing, up to the model's embedding. The state saves every one of
these facts, so that loading never depends on what today's code would generate.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxgpt import vocabulary
from jaxgpt.errors import InputError, first
from jaxgpt.vocabulary import Encoder, exact_keys, kind_named, refuse_invalid_unicode

if TYPE_CHECKING:
    from jaxgpt.chat import Template

END_OF_TEXT = "end_of_text"
PAD = "pad"
END = "end"
"""Name of the special token that ends a turn, in templates that have one."""
ALWAYS = {END_OF_TEXT: vocabulary.END_OF_TEXT, PAD: "<|pad|>"}
"""Special tokens of every tokenizer, name to string; `pad` only where the embedding has a row for it."""

STATE_VERSION = 1
ROW_MULTIPLE = 64
"""Embedding rows are rounded up to this, which matrix units like."""


@dataclass(frozen=True)
class Special:
    """A special token: what code calls it, what decoding prints, and its id."""

    name: str
    text: str
    id: int


# -- The tokenizer ---------------------------------------------------------------------


class Tokenizer:
    """A base vocabulary and its special tokens.

    Attributes:
        kind: a key of KINDS.
        specials: the special tokens, by id.
        base_vocab_size: ids of the base vocabulary, its own special tokens included.
        vocab_size: one more than the highest id that means something.
        model_vocab_size: rows of the model's embedding, at least vocab_size.
    """

    def __init__(self, kind: str, encoder: Encoder, specials: Iterable[Special], model_vocab_size: int) -> None:
        """Use `create` or `from_state`. Raises InputError where ids, names or strings clash."""
        self.kind = kind
        self.base_vocab_size = encoder.size
        self.specials = tuple(sorted(specials, key=lambda special: special.id))
        self.model_vocab_size = model_vocab_size
        self._encoder = encoder
        _check_specials(self.specials, encoder, model_vocab_size)
        self.vocab_size = max([self.base_vocab_size, *(special.id + 1 for special in self.specials)])
        self._tokens = [*encoder.token_bytes(), *[b""] * (self.vocab_size - encoder.size)]
        for special in self.specials:
            self._tokens[special.id] = special.text.encode()
        self._by_name = {special.name: special for special in self.specials}
        self._id_of_text = {special.text: special.id for special in self.specials}
        self.special_ids = frozenset(self._id_of_text.values())
        # Alternatives are tried in order: the longest first, so that no prefix can win.
        longest_first = sorted(self._id_of_text, key=len, reverse=True)
        self._marker = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def create(
        cls,
        kind: str,
        *,
        template: "Template",
        corpus: Iterable[str] = (),
        model_vocab_size: int | None = None,
    ) -> "Tokenizer":
        """A new tokenizer with the special tokens that the template asks for.

        Args:
            kind: a key of KINDS.
            template: its special tokens get the ids after the base vocabulary.
            corpus: texts whose code points `char` knows as one id each.
            model_vocab_size: rows of an embedding that exists already; by default
                vocab_size rounded up to a multiple of 64. Where it leaves no row for
                `pad`, there is none, and `pad_id` is end_of_text's.

        Raises:
            InputError: unknown kind, too few rows, clashing special tokens, or a
                lone surrogate in the corpus.
        """
        encoder = kind_named(kind).build(corpus)
        own = encoder.specials.get(ALWAYS[END_OF_TEXT])
        specials = [] if own is None else [Special(END_OF_TEXT, ALWAYS[END_OF_TEXT], own)]
        wanted = dict(template.specials) if specials else {END_OF_TEXT: ALWAYS[END_OF_TEXT], **template.specials}
        if model_vocab_size is None or model_vocab_size > encoder.size + len(wanted):
            wanted[PAD] = ALWAYS[PAD]
        specials += _numbered(wanted, encoder.size)
        needed = encoder.size + len(wanted)
        rows = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE if model_vocab_size is None else model_vocab_size
        _refuse_too_few_rows(needed, rows, template)
        return cls(kind, encoder, specials, rows)

    def with_template(self, template: "Template") -> "Tokenizer":
        """This tokenizer plus what the template lacks, in rows of the embedding that meant nothing.

        Every id keeps its meaning, so that a base model can be fine-tuned with another
        template than it was made for.

        Raises:
            InputError: no spare rows, or a name that stands for another string already.
        """
        for name, text in template.specials.items():
            if name in self._by_name and self._by_name[name].text != text:
                raise InputError(
                    f"template {template.name} needs {name} to be {text}, this tokenizer has "
                    f"{self._by_name[name].text}; use the template it was made with"
                )
        wanted = {name: text for name, text in template.specials.items() if name not in self._by_name}
        _refuse_too_few_rows(self.vocab_size + len(wanted), self.model_vocab_size, template)
        specials = [*self.specials, *_numbered(wanted, self.vocab_size)]
        return Tokenizer(self.kind, self._encoder, specials, self.model_vocab_size)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of the text.

        Without `specials` all of it is ordinary text, whatever it looks like. With
        `specials`, strings of special tokens become their ids, the longest first.

        Raises:
            InputError: the text has a lone surrogate.
        """
        refuse_invalid_unicode(text)
        if not specials:
            return self._encoder.encode_ordinary(text)
        ids: list[int] = []
        for piece in self._marker.split(text):
            if piece in self._id_of_text:
                ids.append(self._id_of_text[piece])
            else:
                ids += self._encoder.encode_ordinary(piece)
        return ids

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """Text of the ids; an id without a token is nothing, bytes that are not UTF-8 are U+FFFD."""
        skipped = self.special_ids if skip_specials else frozenset[int]()
        return b"".join(self.token_bytes(id) for id in ids if id not in skipped).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 of one id: a special token's string, `b""` for an id without a token."""
        return self._tokens[id] if 0 <= id < self.vocab_size else b""

    def token_name(self, id: int) -> str:
        """One id in printable form, for reports: `' the'`, `b'\\xe4'`, `<|end|>`, `<no token>`."""
        token = self.token_bytes(id)
        if not token:
            return "<no token>"
        try:
            text = token.decode()
        except UnicodeDecodeError:
            return repr(token)
        return text if id in self.special_ids else repr(text)

    def special(self, name: str) -> Special:
        """The special token of that name; raises InputError where there is none."""
        if name not in self._by_name:
            raise InputError(f"tokenizer has no special token {name!r}; it has {', '.join(self._by_name)}")
        return self._by_name[name]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply: end of text, and the template's end of turn where it has one."""
        return tuple(self._by_name[name].id for name in (END_OF_TEXT, END) if name in self._by_name)

    @property
    def pad_id(self) -> int:
        """Fills batches, under mask 0; end of text where the embedding has no row for `pad`."""
        return self._by_name[PAD if PAD in self._by_name else END_OF_TEXT].id

    def state(self) -> dict[str, Any]:
        """Everything `from_state` needs, as JSON values."""
        return {
            "version": STATE_VERSION,
            "kind": self.kind,
            "base_vocab_size": self.base_vocab_size,
            "model_vocab_size": self.model_vocab_size,
            "special_tokens": [special.text for special in self.specials],
            "special_token_ids": {special.text: special.id for special in self.specials},
            "special_name_ids": {special.name: special.id for special in self.specials},
            "data": self._encoder.data(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], model_vocab_size: int) -> "Tokenizer":
        """Exactly the tokenizer that was saved; inverse of `state`.

        Args:
            state: what `state` returned.
            model_vocab_size: the model config's vocab_size.

        Raises:
            InputError: an unknown version or kind, sizes that differ from the kind's or
                the model's, or special tokens that contradict each other or the base
                vocabulary; both maps are in the message.
        """
        if state.get("version") != STATE_VERSION:
            raise InputError(f"tokenizer state has version {state.get('version')!r}; this jaxgpt reads {STATE_VERSION}")
        exact_keys("tokenizer state", state, _STATE_KEYS)
        encoder = kind_named(state["kind"]).restore(state["data"])
        if state["base_vocab_size"] != encoder.size:
            raise InputError(
                f"tokenizer state has base_vocab_size {state['base_vocab_size']!r}, "
                f"but its {state['kind']} vocabulary has {encoder.size:,} ids; the checkpoint's tokenizer is damaged"
            )
        if state["model_vocab_size"] != model_vocab_size:
            raise InputError(
                f"tokenizer is for a model of {state['model_vocab_size']!r} rows, "
                f"the model embeds {model_vocab_size}; load the tokenizer saved with this model"
            )
        try:
            return cls(state["kind"], encoder, _saved_specials(state), model_vocab_size)
        except InputError as error:
            maps = (json.dumps(state[key], ensure_ascii=False) for key in ("special_token_ids", "special_name_ids"))
            raise InputError("{}; saved strings {}, names {}".format(error, *maps)) from None


_STATE_KEYS = {
    "version",
    "kind",
    "base_vocab_size",
    "model_vocab_size",
    "special_tokens",
    "special_token_ids",
    "special_name_ids",
    "data",
}


def _numbered(texts: Mapping[str, str], start: int) -> list[Special]:
    return [Special(name, text, id) for id, (name, text) in enumerate(texts.items(), start=start)]


def _refuse_too_few_rows(needed: int, rows: int, template: "Template") -> None:
    if needed > rows:
        raise InputError(
            f"tokenizer has {needed:,} tokens with those of template {template.name}, model embeds {rows:,}; "
            "choose a template that adds fewer (plain adds none), or a model with more rows"
        )


def _saved_specials(state: Mapping[str, Any]) -> list[Special]:
    texts, ids, names = state["special_tokens"], state["special_token_ids"], state["special_name_ids"]
    if not (isinstance(texts, list) and isinstance(ids, dict) and isinstance(names, dict)):
        raise InputError("tokenizer state must hold special tokens as one list and two objects")
    if any(not isinstance(text, str) for text in texts):
        raise InputError("special tokens must be strings")
    if not len(texts) == len(ids) == len(names):
        raise InputError(f"{len(texts)} special tokens, but {len(ids)} ids by string and {len(names)} ids by name")
    if any(type(id) is not int for id in [*ids.values(), *names.values()]):
        raise InputError("ids of special tokens must be integers")
    without_id = [repr(text) for text in texts if text not in ids]
    if without_id:
        raise InputError(f"special tokens without an id: {first(without_id)}")
    if sorted(ids.values()) != sorted(names.values()):
        raise InputError("ids by string and ids by name differ")
    # Two strings with one id both reach the check of unique ids.
    name_of = {id: name for name, id in names.items()}
    return [Special(name_of[id], text, id) for text, id in ids.items()]


def _check_specials(specials: Sequence[Special], encoder: Encoder, rows: int) -> None:
    """Raise InputError unless ids and strings are unique, and each id free for it.

    A base vocabulary's own special tokens keep their ids; all others lie in
    [base_vocab_size, rows).
    """
    by_id: dict[int, Special] = {}
    by_text: dict[str, Special] = {}
    for special in specials:
        refuse_invalid_unicode(special.text)
        if not special.text:
            raise InputError(f"special token {special.name} is an empty string; give it one")
        same_id, same_text = by_id.setdefault(special.id, special), by_text.setdefault(special.text, special)
        if same_id is not special:
            raise InputError(f"{special.text} has id {special.id}, already {same_id.text!r}")
        if same_text is not special:
            raise InputError(f"special tokens {same_text.name} and {special.name} are both {special.text}; change one")
        _check_place(special, encoder, rows)
    if END_OF_TEXT not in {special.name for special in specials}:
        raise InputError(f"no special token is named {END_OF_TEXT}")


def _check_place(special: Special, encoder: Encoder, rows: int) -> None:
    own = encoder.specials.get(special.text)
    if own == special.id:
        return
    if own is not None:
        raise InputError(f"{special.text} has id {special.id}, but {own} in the base vocabulary")
    if 0 <= special.id < encoder.size:
        token = encoder.token_bytes()[special.id].decode(errors="replace")
        raise InputError(f"{special.text} has id {special.id}, already {token!r}")
    if not encoder.size <= special.id < rows:
        raise InputError(f"{special.text} has id {special.id}, outside the added ids {encoder.size} to {rows - 1}")
