"""Repairs of a text side, measured on exact ids."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.chat import Message, Rendered
from jaxgpt.tokenizer import END, END_OF_TEXT
from oracle import text_probe
from oracle.repairs import pre_tokenizers
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import ids
from oracle.rungs.ids import TextSite
from oracle.site import Site
from oracle.text import Text

Encode = Callable[[str], list[int]]
Render = Callable[[Text, Sequence[Message]], Rendered]


def _at(site: Site, *taps: str) -> TextSite | None:
    assert isinstance(site, TextSite)
    # What raises an exception has no ids that a change of ids could set right.
    return site if site.finding.tap in taps and ids.RAISED not in site.finding.problem else None


# -- Special ids -----------------------------------------------------------------------


def shifted(site: Site) -> Iterator[Variant]:
    """All special ids, or all that were added to the vocabulary, so much lower."""
    at = _at(site, ids.SPECIALS, ids.PARSE, ids.TEMPLATE)
    if at is None:
        return
    added = {name for name, special in at.walk.specials.items() if special.id >= at.text.saved["base_vocab_size"]}
    for by in _shifts(at):
        for names, which in ((set(at.text.specials), "all special ids"), (added, "the added special ids")):
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
    messages = _conversations(at)[at.finding.where]
    return at.text.render(at.text, messages).ids, at.walk.expected_rendering(messages)[0]


def _conversations(at: TextSite) -> dict[str, list[Message]]:
    template = at.text.saved_template
    assert template is not None
    return dict(text_probe.conversations(template["turns"], template["trained_role"], list(at.walk.strings)))


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
    at = _at(site, ids.SPECIALS)
    if at is None:
        return
    ours, saved = at.text.specials, at.walk.specials
    if ours.keys() == saved.keys() and {s.id for s in ours.values()} == {s.id for s in saved.values()}:
        specials = {name: replace(special, id=saved[name].id) for name, special in ours.items()}
        yield Variant("with the saved id for every name", at.changed(specials=specials))


# -- Text ------------------------------------------------------------------------------


def escaped(site: Site) -> Iterator[Variant]:
    """What looks like a special token cut where the pre-tokenizer cuts it, and encoded piece by piece."""
    at = _at(site, ids.USER)
    if at is None or at.walk.reference.pieces is None:
        return
    encode, cut, strings = at.text.encode, at.walk.reference.pieces, list(at.walk.strings)

    def apart(text: str) -> list[int]:
        if not any(string in text for string in strings):
            return encode(text)
        return [id for piece in cut(text) for id in encode(piece)]

    yield Variant("with the special strings in it cut to pieces", at.changed(encode=apart))


def ordinary_contents(site: Site) -> Iterator[Variant]:
    """Contents that hold special strings encoded as ordinary text, between what the renderer puts around them."""
    at = _at(site, ids.TEMPLATE)
    if at is not None and at.finding.where == text_probe.TYPED:
        strings = list(at.walk.strings)
        render = _framing(at.text.render, lambda content: any(string in content for string in strings))
        yield Variant("with contents encoded as ordinary text", at.changed(render=render))


def whole_contents(site: Site) -> Iterator[Variant]:
    """Contents with spaces around them put in whole."""
    at = _at(site, ids.TEMPLATE)
    if at is not None and at.finding.where == text_probe.SPACES:
        render = _framing(at.text.render, lambda content: content != content.strip())
        yield Variant("with the spaces around the contents kept", at.changed(render=render))


def longer_first(site: Site) -> Iterator[Variant]:
    """Special tokens that begin with another one recognised before anything else is looked at."""
    at = _at(site, ids.PARSE)
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


def cut_first(site: Site) -> Iterator[Variant]:
    """The text cut by the reference's pre-tokenizer, and each piece given to the candidate."""
    at = _at(site, ids.ENCODE)
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
            yield Variant(change, at.changed(encode=_unless(encode, other, reference.encode)))


def spelled(site: Site) -> Iterator[Variant]:
    """Undone wherever the candidate answers as the reference's vocabulary does, read as one of another kind."""
    at = _at(site, ids.ENCODE)
    if at is None or not at.walk.reference.vocabulary:
        return
    encode, reference = at.text.encode, at.walk.reference
    for name, other in pre_tokenizers.spellings(reference, encode):
        yield Variant(f"with {name} undone", at.changed(encode=_unless(encode, other, reference.encode)))


def _unless(encode: Encode, wrong: Encode, right: Encode) -> Encode:
    """The candidate's own ids, but where they are exactly those that a certain mistake makes."""

    def undone(text: str) -> list[int]:
        given = encode(text)
        return right(text) if given == wrong(text) else given

    return undone


# -- Around the contents ---------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """What a renderer puts around one message's content."""

    prefix: list[int]
    suffix: list[int]
    before: list[int]
    """The mask of the prefix."""
    content: int
    """That of the content."""
    after: list[int]


def _frame(render: Render, text: Text, role: str) -> _Frame:
    """Found from the renderings of an empty content and of a letter."""
    empty = render(text, [Message(role=role, content="")])
    letter = render(text, [Message(role=role, content="x")])
    width = len(text.encode("x"))
    start = next((i for i, (a, b) in enumerate(zip(empty.ids, letter.ids, strict=False)) if a != b), len(empty.ids))
    mask = letter.mask
    return _Frame(empty.ids[:start], empty.ids[start:], mask[:start], mask[start], mask[start + width :])


def _framing(render: Render, wanted: Callable[[str], bool]) -> Render:
    """A renderer that puts certain contents, encoded as ordinary text, into the frames of another."""

    def framing(now: Text, messages: Sequence[Message]) -> Rendered:
        found, mask = list[int](), list[int]()
        for message in messages:
            if wanted(message["content"]):
                frame, content = _frame(render, now, message["role"]), now.encode(message["content"])
                found += frame.prefix + content + frame.suffix
                mask += frame.before + [frame.content] * len(content) + frame.after
            else:
                made = render(now, [message])
                found, mask = found + made.ids, mask + made.mask
        return Rendered(found, mask)

    return framing


def moved_mask(site: Site) -> Iterator[Variant]:
    """The mask one place to the left or right, or the trained stretches one shorter or longer at one end."""
    at = _at(site, ids.MASK)
    if at is None:
        return
    template, render = at.text.saved_template, at.text.render
    assert template is not None
    trained = template["trained_role"]
    changes: Mapping[str, Callable[[Text, Rendered, Sequence[Message]], list[int]]] = {
        "one place earlier": lambda _, made, m: [*made.mask[1:], _last(at, made, m[-1]["role"] == trained)],
        "one place later": lambda _, made, __: [0, *made.mask[:-1]],
        "without the first of each stretch": lambda _, made, __: _shorter(made.mask, first=True),
        "without the last of each stretch": lambda _, made, __: _shorter(made.mask, first=False),
        "with the token after each reply": lambda now, made, m: _longer(render, now, made.mask, m, trained, after=True),
        "with the first token of each reply": lambda now, made, m: _longer(
            render, now, made.mask, m, trained, after=False
        ),
    }
    for name, change in changes.items():

        def masked(now: Text, messages: Sequence[Message], change: Any = change) -> Rendered:
            made = render(now, messages)
            return Rendered(made.ids, change(now, made, messages))

        yield Variant(f"with the mask {name}", at.changed(render=masked))


def _last(at: TextSite, made: Rendered, trained: bool) -> int:
    """What a mask that was pushed over the end has lost: an end token that was trained."""
    ends = {at.walk.specials[name].id for name in (END_OF_TEXT, END) if name in at.walk.specials}
    return int(trained and made.ids[-1] in ends)


def _shorter(mask: Sequence[int], *, first: bool) -> list[int]:
    beside = [0, *mask[:-1]] if first else [*mask[1:], 0]
    return [int(on and other) for on, other in zip(mask, beside, strict=True)]


def _longer(
    render: Render, now: Text, mask: Sequence[int], messages: Sequence[Message], trained: str, *, after: bool
) -> list[int]:
    """The mask with one more token of every reply, found where each message ends when it is rendered alone."""
    longer, place = list(mask), 0
    for message in messages:
        if message["role"] == trained:
            prefix = len(_frame(render, now, trained).prefix)
            longer[place + prefix + (len(now.encode(message["content"])) if after else 0)] = 1
        place += len(render(now, [message]).ids)
    return longer


# -- Before and after ------------------------------------------------------------------


def bos_doubled(site: Site) -> Iterator[Variant]:
    """Without the first of the special tokens that stand before a text, one too many."""
    yield from _without_bos(site, lambda given, expected: given > max(expected, 1))


def bos_added(site: Site) -> Iterator[Variant]:
    """Without the special token before a text, where the reference has none."""
    yield from _without_bos(site, lambda given, expected: given == 1 and expected == 0)


def _without_bos(site: Site, applies: Callable[[int, int], bool]) -> Iterator[Variant]:
    at = _at(site, ids.BOS)
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
    at = _at(site, ids.BOS)
    if at is None:
        return
    prompt = at.text.prompt
    for special in at.walk.specials.values():

        def more(now: Text, string: str, id: int = special.id) -> list[int]:
            found = prompt(now, string)
            return found if found == [id] else [id, *found]

        yield Variant(f"with {special.text} before a text", at.changed(prompt=more))


def more_stops(site: Site) -> Iterator[Variant]:
    """With the tokens that end a text or a turn among the stop ids."""
    at = _at(site, ids.STOPS)
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
        "user text read as special tokens",
        f"encode contents apart from the template, with encode(text) ({_CHAT}, render)",
        _RUNGS,
        ordinary_contents,
    ),
    Repair(
        "prefix-matching special",
        f"try special tokens longest first ({_TOKENIZER}, the marker's pattern)",
        _RUNGS,
        longer_first,
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
    Repair("template trims content", f"render contents as they are ({_CHAT}, render)", _RUNGS, whole_contents),
    Repair(
        "conversation mask off by one",
        f"train the content and the end token after it, nothing else ({_CHAT}, render)",
        _RUNGS,
        moved_mask,
    ),
    Repair("BOS doubled", "put BOS in front once, in one place (jaxgpt/lm.py, encode)", _RUNGS, bos_doubled),
    Repair("BOS added", "the tokenizer puts no BOS before a text (jaxgpt/lm.py, encode)", _RUNGS, bos_added),
    Repair("BOS missing", "put BOS in front, as add_bos_token says (jaxgpt/lm.py, encode)", _RUNGS, bos_missing),
    Repair("stop id missing", "stop at every id that ends a text or a turn (jaxgpt/lm.py)", _RUNGS, more_stops),
    Repair(
        "special ids in another order",
        f"take special ids from the checkpoint's tokenizer_state.json by name ({_TOKENIZER})",
        _RUNGS,
        exchanged,
        last_resort=True,
    ),
)
"""Narrow ones first."""
