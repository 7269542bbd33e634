"""Rows: wrong text sides. They must show in the rung ids, at the first claim that does not hold."""

from collections.abc import Callable

from jaxgpt.config import ModelConfig
from oracle.faults import text as t
from oracle.faults.fault import TEXT as NEEDS_TEXT
from oracle.faults.fault import Condition, Fault, Plant, at, everywhere

IDS, ENCODE, DECODE, PARSE = "ids", "text.encode", "text.decode", "text.parse"
TEMPLATE, MASK, BOS, STOPS, SPECIALS = "text.template", "text.mask", "text.bos", "text.stops", "text.specials"
GPT2_VOCABULARY = 50_257
"""Ids; a model with as many has GPT-2's vocabulary, the others know characters."""


def is_bpe(config: ModelConfig) -> bool:
    """The model's vocabulary is GPT-2's."""
    return config.vocab_size >= GPT2_VOCABULARY


def _tags_have_none(what: str) -> Callable[[ModelConfig, str], str]:
    return lambda config, _: "" if is_bpe(config) else f"the template of paired tags has no {what}"


def _row(
    name: str,
    cause: str,
    plant: Plant,
    tap: str,
    applies: Condition = everywhere,
    *,
    place: str = "",
    equivalent: Callable[[ModelConfig, str], str] = lambda *_: "",
) -> Fault:
    # Text has no dtype: once is enough.
    return Fault(
        name,
        cause,
        plant,
        IDS,
        at(tap),
        applies,
        dtypes=("float32",),
        equivalent=equivalent,
        needs=NEEDS_TEXT,
        place=place,
    )


TOKENIZER = (
    _row(
        "wrong pre-tokenizer regex", "the pre-tokenizer's regex is another one", t.spoken(t.wrong_regex), ENCODE, is_bpe
    ),
    _row("merges missing", "merges are missing", t.spoken(t.merges_missing), ENCODE, is_bpe),
    _row(
        "hex or byte-level vocabulary", "byte tokens are numbered by value", t.spoken(t.bytes_by_value), ENCODE, is_bpe
    ),
    _row(
        "hex or byte-level vocabulary",
        "the byte-level alphabet is not decoded",
        t.spoken(t.alphabet_shown),
        DECODE,
        is_bpe,
        place="decoding",
    ),
    _row("text lower-cased", "text is lower-cased", t.prepared(t.lower_case), ENCODE),
    _row("text normalised", "text is normalised to NFKC", t.prepared(t.normalised), ENCODE),
    _row("text stripped", "spaces around a text are lost", t.prepared(t.stripped), ENCODE),
    _row("leading space added", "a space is put before the text", t.prepared(t.with_leading_space), ENCODE),
    _row("line ends converted", "line ends are converted", t.prepared(t.unix_lines), ENCODE),
    _row("characters dropped", "characters beyond ASCII are dropped", t.prepared(t.ascii_only), ENCODE),
    _row(
        "user text becomes control tokens",
        "typed special strings become special tokens",
        t.spoken(t.user_text_parsed),
        "text.user",
    ),
    _row("decoded id by id", "ids are decoded one by one", t.spoken(t.decoded_one_by_one), DECODE),
    _row("leading space removed", "a leading space is removed in decoding", t.spoken(t.decoded_and_stripped), DECODE),
)

SPECIAL = (
    _row("special ids shifted", "the special tokens' ids are shifted by one", t.spoken(t.specials_shifted), SPECIALS),
    _row("special ids swapped", "two special tokens are swapped", t.spoken(t.specials_swapped), SPECIALS),
    _row("prefix-matching special", "a prefix of a special token is taken for it", t.spoken(t.prefix_matched), PARSE),
    _row(
        "special swallows spaces", "special tokens swallow the spaces around them", t.spoken(t.spaces_swallowed), PARSE
    ),
)

CHAT = (
    _row(
        "template without separator",
        "nothing separates two turns",
        t.templated(t.no_separator),
        TEMPLATE,
        equivalent=_tags_have_none("separator"),
    ),
    _row(
        "template without line break",
        "the role's line break is missing",
        t.templated(t.no_line_after_role),
        TEMPLATE,
        equivalent=_tags_have_none("line break"),
    ),
    _row("turn not ended", "the user's turn is not ended", t.templated(t.user_turn_open), TEMPLATE),
    _row("roles swapped", "user and assistant are swapped", t.templated(t.roles_swapped), TEMPLATE),
    _row("contents stripped", "contents are stripped", t.rendered(t.contents_stripped), TEMPLATE),
    _row("system message added", "a system message is added", t.rendered(t.default_system), TEMPLATE),
    _row("BOS before the template", "a BOS is put before a conversation", t.rendered(t.end_of_text_in_front), TEMPLATE),
    _row("mask of everything", "prompts are trained", t.rendered(t.everything_trained), MASK),
    _row("end token not trained", "the end of a reply is not trained", t.rendered(t.end_not_trained), MASK),
    _row("chat mask off by one", "the loss mask is off by one", t.rendered(t.mask_one_late), MASK),
    _row("reply's header trained", "the end of a reply's header is trained", t.rendered(t.header_trained), MASK),
    _row("last reply only", "only the last reply is trained", t.rendered(t.last_reply_only), MASK),
)

AROUND = (
    _row("BOS doubled", "BOS is put before a text twice", t.begun(2), BOS),
    _row("BOS added", "BOS is put before a text", t.begun(1), BOS),
    _row("empty prompt", "an empty prompt has no ids", t.begun(0), BOS),
    _row("stop id missing", "the end of a turn does not stop a reply", t.spoken(t.end_does_not_stop), STOPS),
    _row("stop id too many", "a further id stops a reply", t.spoken(t.pad_stops), STOPS),
)

TEXT = (*TOKENIZER, *SPECIAL, *CHAT, *AROUND)
