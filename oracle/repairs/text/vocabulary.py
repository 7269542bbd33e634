"""Repairs of ids: special tokens, the vocabulary, what goes before a text, and where a reply ends."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from jaxgpt.chat import Message, Rendered
from jaxgpt.tokenizer import END, END_OF_TEXT
from oracle import text_probe, text_reference
from oracle.repairs.repair import Repair, Variant
from oracle.repairs.text import pre_tokenizers
from oracle.rungs import ids
from oracle.rungs.ids import TextSite
from oracle.site import Site
from oracle.text import Text

Encode = Callable[[str], list[int]]


def claim(site: Site, *taps: str) -> TextSite | None:
    """The site, if its claim is one of these and no exception."""
    assert isinstance(site, TextSite)
    # What raises an exception has no ids that a change of ids could set right.
    return site if site.finding.tap in taps and ids.RAISED not in site.finding.problem else None


# -- Special ids -----------------------------------------------------------------------


def shifted(site: Site) -> Iterator[Variant]:
    """All special ids, or all that were added to the vocabulary, so much lower."""
    at = claim(site, ids.SPECIALS, ids.PARSE, ids.TEMPLATE)
    if at is None:
        return
    added = {name for name, special in at.walk.specials.items() if special.id >= at.text.saved["base_vocab_size"]}
    for by in _shifts(at):
        wrong = {name for name, special in at.text.specials.items() if special.id != at.walk.strings.get(special.text)}
        groups = {"all special ids": set(at.text.specials), "the added special ids": added, "those that differ": wrong}
        for which, names in groups.items():
            change = f"with {which} {abs(by)} {'lower' if by > 0 else 'higher'}"
            if at.finding.tap == ids.SPECIALS:
                yield Variant(change, at.changed(**_moved(at.text, names, by)))
                yield Variant(f"{change}, in the saved state too", at.changed(**_moved(at.text, names, by, saved=True)))
            else:
                yield Variant(change, _moved_answers(at, {at.walk.specials[name].id + by for name in names}, by))


def _shifts(at: TextSite) -> list[int]:
    """How far the first special id that differs is off."""
    ours = {special.text: special.id for special in at.text.specials.values()}
    there = next((r.specials for r in at.walk.references if r.label == at.finding.where), at.walk.strings)
    if at.finding.tap == ids.SPECIALS:
        return [by for text, id in there.items() if (by := ours.get(text, id) - id)][:1]
    given, expected = _answers(at)
    special = set(at.walk.strings.values())
    return [a - b for a, b in zip(given, expected, strict=False) if a != b and b in special][:1]


def _answers(at: TextSite) -> tuple[Sequence[int], Sequence[int]]:
    """Ids that show special tokens, and what they should be."""
    if at.finding.tap == ids.PARSE:
        text = "".join(at.walk.strings)
        return at.text.parse(at.text, text), at.walk.parsed(text)
    messages = dict(at.walk.cases)[at.finding.where]
    return at.text.render(at.text, messages).ids, at.walk.expected_rendering(messages)[0]


def _moved(text: Text, names: set[str], by: int, *, saved: bool = False) -> dict[str, Any]:
    """Fields of a text side whose special tokens have other ids, wherever it knows them."""
    specials = {n: replace(s, id=s.id - by) if n in names else s for n, s in text.specials.items()}
    new_of = {text.specials[name].id: special.id for name, special in specials.items()}
    # Decoding may have been right all along.
    known = {new: old for old, new in new_of.items() if text.decode([old]) == _text(text, old) != text.decode([new])}

    def decode(given: Sequence[int]) -> str:
        return text.decode([known.get(id, id) for id in given])

    ends = {text.specials[name].id for name in (END_OF_TEXT, END) if name in text.specials}
    # So may the stop ids.
    stop_ids = tuple(new_of.get(id, id) for id in text.stop_ids) if ends <= set(text.stop_ids) else text.stop_ids
    fields: dict[str, Any] = {"specials": specials, "stop_ids": stop_ids, "decode": decode}
    if saved:
        maps = ("special_token_ids", "special_name_ids")
        state = {key: {k: new_of.get(id, id) for k, id in text.saved[key].items()} for key in maps}
        fields["saved"] = {**text.saved, **state}
    return fields


def _text(text: Text, id: int) -> str:
    return next(special.text for special in text.specials.values() if special.id == id)


def _moved_answers(at: TextSite, wrong: set[int], by: int) -> Any:
    text = at.text

    def right(given: Sequence[int]) -> list[int]:
        return [id - by if id in wrong else id for id in given]

    if at.finding.tap == ids.PARSE:
        return at.changed(parse=lambda now, string: right(text.parse(now, string)))

    def render(now: Text, messages: Sequence[Message]) -> Rendered:
        made = text.render(now, messages)
        return Rendered(right(made.ids), made.mask)

    return at.changed(render=render)


def exchanged(site: Site) -> Iterator[Variant]:
    """The saved ids for the names that have them in another order."""
    at = claim(site, ids.SPECIALS)
    if at is None:
        return
    ours, saved = at.text.specials, at.walk.specials
    if ours.keys() == saved.keys() and {s.id for s in ours.values()} == {s.id for s in saved.values()}:
        specials = {name: replace(special, id=saved[name].id) for name, special in ours.items()}
        yield Variant("with the saved id for every name", at.changed(specials=specials))


# -- Text ------------------------------------------------------------------------------


def escaped(site: Site) -> Iterator[Variant]:
    """What looks like a special token cut where the pre-tokenizer cuts it, and encoded piece by piece."""
    at = claim(site, ids.USER)
    if at is None or at.walk.reference.pieces is None:
        return
    encode, cut, strings = at.text.encode, at.walk.reference.pieces, list(at.walk.strings)

    def apart(text: str) -> list[int]:
        if not any(string in text for string in strings):
            return encode(text)
        return [id for piece in cut(text) for id in encode(piece)]

    yield Variant("with the special strings in it cut to pieces", at.changed(encode=apart))


def longer_first(site: Site) -> Iterator[Variant]:
    """Special tokens that begin with another one recognised before anything else is looked at."""
    at = claim(site, ids.PARSE)
    if at is None:
        return
    names = at.walk.strings
    longer = {text for text in names if any(text != other and text.startswith(other) for other in names)}
    parse, given = at.text.parse, {special.text: special.id for special in at.text.specials.values()}

    def first(now: Text, string: str) -> list[int]:
        for text in sorted(longer, key=len, reverse=True):
            before, found, after = string.partition(text)
            if found:
                return [*first(now, before), given[text], *first(now, after)]
        return parse(now, string)

    if longer:
        yield Variant("with the longer of two that begin alike taken first", at.changed(parse=first))


def misread_specials(site: Site) -> Iterator[Variant]:
    """Undone wherever the text is answered as if a beginning of a special token were the whole."""
    at = claim(site, ids.PARSE)
    if at is None:
        return
    names, encode, parse = at.walk.strings, at.text.encode, at.text.parse
    groups = [[name] for name in names] if len(names) > 1 else []
    for chosen in (list(names), *groups):
        for cut in range(1, 4):
            shorter = {name[:-cut]: names[name] for name in chosen if len(name) > cut + 1}

            def wrong(text: str, taken: Any = shorter) -> list[int]:
                return text_reference.longest_match(text, {**taken, **names}, encode)

            def only(text: str, taken: Any = shorter) -> list[int]:
                rest = {name: id for name, id in names.items() if id not in taken.values()}
                return text_reference.longest_match(text, {**rest, **taken}, encode)

            for mistake in (wrong, only):
                change = f"with special tokens recognised without their last {cut} characters no more"
                yield Variant(change, at.changed(parse=_unless_parsed(parse, mistake, at.walk.parsed)))


def swallowed_spaces(site: Site) -> Iterator[Variant]:
    """Undone wherever spaces beside special tokens are missing."""
    at = claim(site, ids.PARSE)
    if at is None:
        return
    names, encode, parse = at.walk.strings, at.text.encode, at.text.parse
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    for space in (r"\s*", " *", " ?"):
        for before, after, which in (("", space, "after"), (space, "", "before"), (space, space, "around")):
            swallow = re.compile(f"{before}({pattern}){after}")

            def wrong(text: str, swallow: re.Pattern[str] = swallow) -> list[int]:
                return text_reference.longest_match(swallow.sub(r"\1", text), names, encode)

            change = f"with the spaces {which} special tokens kept"
            yield Variant(change, at.changed(parse=_unless_parsed(parse, wrong, at.walk.parsed)))


def _unless_parsed(parse: Any, wrong: Encode, right: Encode) -> Any:
    def undone(now: Text, text: str) -> list[int]:
        given = parse(now, text)
        return right(text) if given == wrong(text) else given

    return undone


def cut_first(site: Site) -> Iterator[Variant]:
    """The text cut by the reference's pre-tokenizer, and each piece given to the candidate."""
    at = claim(site, ids.ENCODE)
    if at is None or at.text.saved["kind"] == "char":
        return
    encode, reference = at.text.encode, at.walk.reference
    if reference.pieces is not None:
        cut = reference.pieces
        yield Variant(
            "with the text cut by the reference's pre-tokenizer",
            at.changed(encode=lambda text: [id for piece in cut(text) for id in encode(piece)]),
        )
    if reference.vocabulary:
        for name, other in pre_tokenizers.others(reference):
            change = f"wherever it answers as the reference does with another pre-tokenizer ({name}), that one's undone"
            yield from mistaken(at, change, other)


def spelled(site: Site) -> Iterator[Variant]:
    """Undone wherever the candidate answers as the reference's vocabulary does, read as one of another kind."""
    at = claim(site, ids.ENCODE)
    if at is None or not at.walk.reference.vocabulary:
        return
    encode, reference = at.text.encode, at.walk.reference
    for name, other in pre_tokenizers.spellings(reference, encode):
        yield from mistaken(at, f"with {name} undone", other)


def mistaken(at: TextSite, change: str, wrong: Encode) -> Iterator[Variant]:
    """The candidate's own ids, but where they are exactly those that a certain mistake makes.

    None where already the first text that differs is answered otherwise.
    """
    encode, right, first = at.text.encode, at.walk.reference.encode, at.once(_first_wrong)
    if first is None or encode(first) != wrong(first):
        return

    def undone(text: str) -> list[int]:
        given = encode(text)
        return right(text) if given == wrong(text) else given

    yield Variant(change, at.changed(encode=undone))


def _first_wrong(at: TextSite) -> str | None:
    encode, right = at.text.encode, at.walk.reference.encode
    return next((text for text in text_probe.texts(at.comparison.seed) if encode(text) != right(text)), None)


# -- Before and after ------------------------------------------------------------------


def bos_doubled(site: Site) -> Iterator[Variant]:
    """Without the first of the special tokens that stand before a text, one too many."""
    yield from _without_bos(site, lambda given, expected: given > max(expected, 1))


def bos_added(site: Site) -> Iterator[Variant]:
    """Without the special token before a text, where the reference has none."""
    yield from _without_bos(site, lambda given, expected: given == 1 and expected == 0)


def _without_bos(site: Site, applies: Callable[[int, int], bool]) -> Iterator[Variant]:
    at = claim(site, ids.BOS)
    if at is None:
        return
    prompt, special = at.text.prompt, set(at.walk.strings.values())
    given, expected = _leading(at.walk.prompt("a"), special), len(at.walk.reference.front)
    if applies(given, expected):
        surplus = given - expected

        def fewer(now: Text, string: str) -> list[int]:
            found = prompt(now, string)
            # An empty text keeps the one token that it starts after.
            return found[min(surplus, max(0, len(found) - 1)) :]

        yield Variant(f"without {surplus} of the {given} special tokens before a text", at.changed(prompt=fewer))


def _leading(given: Sequence[int], special: set[int]) -> int:
    return next((i for i, id in enumerate(given) if id not in special), len(given))


def bos_missing(site: Site) -> Iterator[Variant]:
    """With each special token put before a text."""
    at = claim(site, ids.BOS)
    if at is None:
        return
    prompt = at.text.prompt
    for special in at.walk.specials.values():

        def more(now: Text, string: str, id: int = special.id) -> list[int]:
            found = prompt(now, string)
            return found if found == [id] else [id, *found]

        yield Variant(f"with {special.text} before a text", at.changed(prompt=more))


def empty_prompt(site: Site) -> Iterator[Variant]:
    """With the end of text as the one token that an empty text starts after."""
    at = claim(site, ids.BOS)
    if at is None or END_OF_TEXT not in at.text.specials or at.text.prompt(at.text, ""):
        return
    prompt, start = at.text.prompt, at.text.specials[END_OF_TEXT]
    change = f"with {start.text} for an empty text"
    yield Variant(change, at.changed(prompt=lambda now, string: prompt(now, string) or [start.id]))


def fewer_stops(site: Site) -> Iterator[Variant]:
    """Without the stop ids that end neither a text nor a turn."""
    at = claim(site, ids.STOPS)
    if at is None or not set(at.walk.expected_stops) < set(at.text.stop_ids):
        return
    surplus = sorted(set(at.text.stop_ids) - set(at.walk.expected_stops))
    stops = tuple(id for id in at.text.stop_ids if id not in surplus)
    yield Variant(f"without {', '.join(map(str, surplus))} as stop id", at.changed(stop_ids=stops))


def more_stops(site: Site) -> Iterator[Variant]:
    """With the tokens that end a text or a turn among the stop ids."""
    at = claim(site, ids.STOPS)
    if at is None:
        return
    ends = [at.text.specials[name] for name in (END_OF_TEXT, END) if name in at.text.specials]
    for chosen in ([special] for special in ends), [ends]:
        for specials in chosen:
            texts = " and ".join(special.text for special in specials)
            stops = {*at.text.stop_ids, *(special.id for special in specials)}
            yield Variant(f"with {texts} as stop id", at.changed(stop_ids=tuple(sorted(stops))))


_RUNGS = (ids.NAME,)
_TOKENIZER = "jaxgpt/tokenizer.py"
_CHAT = "jaxgpt/chat.py"

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "special ids shifted",
        f"take special ids from the checkpoint's tokenizer_state.json, and never count them anew ({_TOKENIZER})",
        _RUNGS,
        shifted,
    ),
    Repair(
        "user text read as special tokens",
        f"encode what people type with encode(text), which knows no special token; only templates emit them ({_CHAT})",
        _RUNGS,
        escaped,
    ),
    Repair(
        "prefix-matching special",
        f"try special tokens longest first ({_TOKENIZER}, the marker's pattern)",
        _RUNGS,
        longer_first,
    ),
    Repair(
        "prefix-matching special",
        f"recognise a special token by its whole string only ({_TOKENIZER}, the marker's pattern)",
        _RUNGS,
        misread_specials,
    ),
    Repair(
        "special token swallows spaces",
        f"leave the text beside a special token as it is: no lstrip, no rstrip ({_TOKENIZER})",
        _RUNGS,
        swallowed_spaces,
    ),
    Repair(
        "wrong pre-tokenizer regex",
        "take the pre-tokenizer's pattern from the model's own tokenizer.json (jaxgpt/vocabulary.py, pat_str)",
        _RUNGS,
        cut_first,
    ),
    Repair(
        "hex vs byte-level vocabulary",
        "spell bytes in the alphabet the vocabulary is written in: count its names 00…ff first (jaxgpt/vocabulary.py)",
        _RUNGS,
        spelled,
    ),
    Repair("BOS doubled", "put BOS in front once, in one place (jaxgpt/lm.py, encode)", _RUNGS, bos_doubled),
    Repair("BOS added", "the tokenizer puts no BOS before a text (jaxgpt/lm.py, encode)", _RUNGS, bos_added),
    Repair("BOS missing", "put BOS in front, as add_bos_token says (jaxgpt/lm.py, encode)", _RUNGS, bos_missing),
    Repair("stop id missing", "stop at every id that ends a text or a turn (jaxgpt/lm.py)", _RUNGS, more_stops),
    Repair("stop id too many", "stop at the ids that end a text or a turn only (jaxgpt/lm.py)", _RUNGS, fewer_stops),
    Repair(
        "empty prompt without a first token",
        "an empty prompt starts after an end of text (jaxgpt/lm.py, encode)",
        _RUNGS,
        empty_prompt,
    ),
    Repair(
        "special ids in another order",
        f"take special ids from the checkpoint's tokenizer_state.json by name ({_TOKENIZER})",
        _RUNGS,
        exchanged,
        last_resort=True,
    ),
)
"""Narrow ones first."""
