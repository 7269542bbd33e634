"""Text to ids and back: one Tokenizer, its kinds, and its state.

A tokenizer is a base vocabulary (its kind) plus special tokens that only a template
may emit, and added tokens that are content. Ids run: base vocabulary, tokens added by
jaxgpt, then rows that mean nothing, up to the model's embedding. The state saves every one of
these facts, so that loading never depends on what today's code would generate.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError, first
from jaxgpt.special_tokens import (
    ALWAYS,
    END,
    END_OF_TEXT,
    PAD,
    Special,
    check_added,
    check_found,
    check_specials,
    saved_added,
    saved_specials,
)
from jaxgpt.vocabularies.byte_alphabet import unspelled
from jaxgpt.vocabularies.kinds import SPACES, Encoder, Merges, exact_keys, kind_named, refuse_invalid_unicode
from jaxgpt.vocabularies.token_matching import TokenMatcher
from jaxgpt.vocabularies.token_notes import as_content

if TYPE_CHECKING:
    import numpy as np

    from jaxgpt.chat import Template

STATE_VERSION = 2
"""Version 1 had neither added tokens nor files."""
ROW_MULTIPLE = 64
"""Embedding rows are rounded up to this, which matrix units like."""


# -- The tokenizer ---------------------------------------------------------------------


class Tokenizer:
    """A base vocabulary and its special tokens.

    Attributes:
        kind: a key of KINDS.
        specials: the special tokens, by id.
        base_vocab_size: ids of the base vocabulary, its own special tokens included.
        vocab_size: one more than the highest id that means something.
        model_vocab_size: rows of the model's embedding, at least vocab_size.
        encoder: the base vocabulary.
        added: tokens that are content and one id each wherever they occur in text, string to id.
        files: files of the folder it came from that say more than the state, name to text; of tokens added since,
            they know nothing.
    """

    def __init__(
        self,
        kind: str,
        encoder: Encoder,
        specials: Iterable[Special],
        model_vocab_size: int,
        *,
        added: Mapping[str, int] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Use `create` or `from_state`. Raises InputError where ids, names or strings clash.

        `added` are the tokens besides the vocabulary's own.
        """
        self.kind = kind
        self.base_vocab_size = encoder.size
        self.files = dict(files or {})
        self._added = dict(added or {})
        self.added = {**encoder.added, **self._added}
        self.specials = tuple(sorted(specials, key=lambda special: special.id))
        self.model_vocab_size = model_vocab_size
        self.encoder = encoder
        check_specials(self.specials, encoder, model_vocab_size)
        check_added(self._added, self.specials, encoder, model_vocab_size)
        ids = [*self._added.values(), *(special.id for special in self.specials)]
        self.vocab_size = max([self.base_vocab_size, *(id + 1 for id in ids)])
        self._tokens = [*encoder.token_bytes(), *[b""] * (self.vocab_size - encoder.size)]
        for special in self.specials:
            self._tokens[special.id] = special.text.encode()
        for text, id in self._added.items():
            self._tokens[id] = text.encode()
        self._by_name = {special.name: special for special in self.specials}
        self._id_of_text = {special.text: special.id for special in self.specials}
        self.special_ids = frozenset(self._id_of_text.values())
        self._matcher = TokenMatcher({**self._early(), **self._id_of_text}, encoder.edges)

    @classmethod
    def create(
        cls,
        kind: str,
        *,
        template: "Template | None",
        corpus: Iterable[str] = (),
        model_vocab_size: int | None = None,
    ) -> "Tokenizer":
        """A new tokenizer with the special tokens that the template asks for.

        Args:
            kind: a key of KINDS.
            template: its special tokens get the ids after the base vocabulary; None has none.
            corpus: texts whose code points `char` knows as one id each.
            model_vocab_size: rows of an embedding that exists already; by default
                vocab_size rounded up to a multiple of 64. Where it leaves no row for
                `pad`, there is none, and `pad_id` is end_of_text's.

        Raises:
            InputError: unknown kind, too few rows, clashing special tokens, or a
                lone surrogate in the corpus.
        """
        return cls.of_vocabulary(kind, kind_named(kind).build(corpus), template, model_vocab_size)

    @classmethod
    def of_vocabulary(
        cls,
        kind: str,
        encoder: Encoder,
        template: "Template | None",
        model_vocab_size: int | None = None,
        *,
        names: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> "Tokenizer":
        """A tokenizer of a base vocabulary; its own special tokens keep their ids.

        Args:
            kind: the encoder's.
            encoder: the vocabulary.
            template: what it asks for that the vocabulary lacks gets the next ids, as do
                `end_of_text` and, where there is a row, `pad`. Without one, only a
                missing `end_of_text` does.
            model_vocab_size: as in `create`.
            names: what code calls the vocabulary's own special tokens, name to string;
                the others go by their string.
            files: see `Tokenizer.files`.

        Raises:
            InputError: too few rows, or clashing special tokens.
        """
        asked = dict(template.specials) if template else {}
        own = _names_by_text(encoder, names or {}, asked)
        specials = [Special(own.get(text, text), text, id) for text, id in encoder.specials.items()]
        found = {special.name for special in specials}
        wanted = {name: text for name, text in {**ALWAYS, **asked}.items() if name not in found and name != PAD}
        needed = encoder.size + len(wanted)
        if template and PAD not in found and (model_vocab_size is None or model_vocab_size > needed):
            wanted[PAD] = ALWAYS[PAD]
        needed = encoder.size + len(wanted)
        rows = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE if model_vocab_size is None else model_vocab_size
        _refuse_too_few_rows(needed, rows, template)
        return cls(kind, encoder, [*specials, *_numbered(wanted, encoder.size)], rows, files=files)

    def with_template(self, template: "Template") -> "Tokenizer":
        """This tokenizer plus what the template lacks, in rows of the embedding that meant nothing.

        Every id keeps its meaning, so that a base model can be fine-tuned with another
        template than it was made for.

        Raises:
            InputError: no spare rows, a name that stands for another string already, or an added token that
                holds one of the template's.
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
        if wanted:
            check_found(self._added, specials, self.kind)
        return Tokenizer(self.kind, self.encoder, specials, self.model_vocab_size, added=self._added, files=self.files)

    def with_added(self, texts: Iterable[str]) -> "Tokenizer":
        """This tokenizer with domain tokens, such as `<MUL_2_3_6>`: one id each wherever they occur in text.

        They are content: decoding prints them, `skip_specials` too, and people may type
        them. Every other id keeps its meaning. Where the embedding has too few rows the
        new tokenizer asks for more (`model_vocab_size`), and the model must get them.

        Raises:
            InputError: an empty string, one that is a token already, or one that holds a special token.
        """
        wanted = list(dict.fromkeys(texts))
        added = {**self._added, **{text: id for id, text in enumerate(wanted, start=self.vocab_size)}}
        # By its bytes and by its spelling in a vocabulary's file, where other programs would find it again.
        own = {token: id for id, token in enumerate(self._tokens) if token}
        for text in wanted:
            refuse_invalid_unicode(text)
            taken = own.get(text.encode(), own.get(unspelled(text) or b""))
            if taken is not None:
                raise InputError(f"{text} is token {taken} already; leave it out")
        check_found(wanted, self.specials, self.kind)
        needed = self.vocab_size + len(wanted)
        more = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
        rows = self.model_vocab_size if needed <= self.model_vocab_size else more
        return Tokenizer(self.kind, self.encoder, self.specials, rows, added=added, files=self.files)

    def with_content(self, texts: Collection[str]) -> "Tokenizer":
        """This tokenizer with some of its special tokens as added ones: content that decoding prints, under their ids.

        Raises:
            InputError: one that is no special token, or the end of text.
        """
        unknown = [text for text in texts if text not in self._id_of_text]
        if unknown:
            raise InputError(f"{first(unknown)}: no special token of this tokenizer")
        encoder = self.encoder.with_content([text for text in texts if text in self.encoder.specials])
        added = {text: self._id_of_text[text] for text in texts if text not in self.encoder.specials}
        kept = [special for special in self.specials if special.text not in texts]
        files = as_content(self.files, texts)
        return Tokenizer(self.kind, encoder, kept, self.model_vocab_size, added={**self._added, **added}, files=files)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of the text.

        Without `specials` all of it is ordinary text, whatever it looks like. With
        `specials`, strings of special tokens become their ids, the longest first, with
        the white space beside them that their vocabulary says is theirs.

        Raises:
            InputError: the text has a lone surrogate.
        """
        refuse_invalid_unicode(text)
        if not specials and not self._added:
            return self.encoder.encode_ordinary(text)
        ids: list[int] = []
        for piece in self._matcher.cut(text, silent=() if specials else self._id_of_text):
            ids += self.encoder.encode_ordinary(piece) if isinstance(piece, str) else [piece]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Ids of each text, uint32, as `encode` gives them without `specials`; faster than one by one.

        Raises:
            InputError: a text has a lone surrogate.
        """
        import numpy as np

        if self._added:
            return [np.asarray(self.encode(text), np.uint32) for text in texts]
        for text in texts:
            refuse_invalid_unicode(text)
        return self.encoder.encode_batch(texts)

    def _early(self) -> dict[str, int]:
        """Added tokens that are looked for before text is normalised; the encoder finds the others itself."""
        return {text: id for text, id in self.added.items() if text not in self.encoder.found_late}

    def normalise(self, text: str) -> str:
        """What decoding the ids of the text gives back: the text itself, or its Unicode normal form (Qwen2: NFC)."""
        return self.encoder.normalise(text)

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
    def merges(self) -> Merges:
        """Pairs of tokens that BPE joins, in the order of their rank; empty for a vocabulary without."""
        return self.encoder.merges

    @property
    def pre_tokenizer(self) -> str:
        """llama.cpp's name of the rule that cuts text into words: `gpt-2`, `qwen2`, `llama-bpe`; else empty."""
        return self.encoder.pre_tokenizer

    @property
    def cuts_before_spaces(self) -> bool:
        """Whether a long text may be encoded in the pieces of `text_cuts.cut`, which changes no id."""
        return self.encoder.cuts_before_spaces and not any(set(text) & set(SPACES) for text in self._added)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """What the vocabulary is made to put before every text (Llama 3); `encode` never does."""
        return self.encoder.bos_ids

    @property
    def unknown_ids(self) -> Sequence[int]:
        """Ids that stand for text the vocabulary lacks."""
        return self.encoder.unknown_ids

    @property
    def unknown_cause(self) -> str:
        """Why there may be many unknown ids."""
        return self.encoder.unknown_cause

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
            "added_token_ids": self._added,
            "files": self.files,
            "data": self.encoder.data(),
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
        if state.get("version") not in (1, STATE_VERSION):
            raise InputError(
                f"tokenizer state has version {state.get('version')!r}; this jaxgpt reads 1 to {STATE_VERSION}"
            )
        if state["version"] == 1:
            state = {"added_token_ids": {}, "files": {}, **state}
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
            specials, added = saved_specials(state), saved_added(state)
            return cls(state["kind"], encoder, specials, model_vocab_size, added=added, files=state["files"])
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
    "added_token_ids",
    "files",
    "data",
}


def _names_by_text(encoder: Encoder, names: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    """Names of the vocabulary's special tokens, by string; what a template asks for comes before what files said."""
    own = {name: text for name, text in ALWAYS.items() if text in encoder.specials}
    said = {name: text for name, text in names.items() if name not in asked and text not in asked.values()}
    named: dict[str, str] = {}
    for name, text in {**own, **said, **asked}.items():
        if named.setdefault(text, name) != name:
            raise InputError(f"special tokens {named[text]} and {name} are both {text}; change one")
    return named


def _numbered(texts: Mapping[str, str], start: int) -> list[Special]:
    return [Special(name, text, id) for id, (name, text) in enumerate(texts.items(), start=start)]


def _refuse_too_few_rows(needed: int, rows: int, template: "Template | None") -> None:
    if needed <= rows:
        return
    if template is None:
        raise InputError(f"tokenizer has {needed:,} tokens, model embeds {rows:,}; give the tokenizer of this model")
    raise InputError(
        f"tokenizer has {needed:,} tokens with those of template {template.name}, model embeds {rows:,}; "
        "choose a template that adds fewer (plain adds none), or a model with more rows"
    )
