"""Repairs of conversations: what a template puts around contents, and which ids are trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.chat import Message, Rendered
from jaxgpt.tokenizer import END, END_OF_TEXT
from oracle import jinja_reference, text_probe, text_reference
from oracle.repairs.repair import Repair, Variant
from oracle.repairs.text.vocabulary import claim
from oracle.rungs import ids
from oracle.rungs.ids import TextSite
from oracle.site import Site
from oracle.text import Text

Render = Callable[[Text, Sequence[Message]], Rendered]
Answer = tuple[list[int], list[int]]
"""Ids and mask of a conversation."""


def _of_turns(site: Site, tap: str) -> TextSite | None:
    """The site, if its claim is this one and the template is written down turn by turn: a program has no such parts."""
    at = claim(site, tap)
    return None if at is None or jinja_reference.is_program(at.text.saved_template) else at


# -- Contents --------------------------------------------------------------------------


def ordinary_contents(site: Site) -> Iterator[Variant]:
    """Contents that hold special strings encoded as ordinary text, between what the renderer puts around them."""
    at = _of_turns(site, ids.TEMPLATE)
    if at is not None and at.finding.where == text_probe.TYPED:
        strings = list(at.walk.strings)
        render = _framing(at.text.render, lambda content: any(string in content for string in strings))
        yield Variant("with contents encoded as ordinary text", at.changed(render=render))


def whole_contents(site: Site) -> Iterator[Variant]:
    """Contents with spaces around them put in whole."""
    at = _of_turns(site, ids.TEMPLATE)
    if at is not None and at.finding.where == text_probe.SPACES:
        render = _framing(at.text.render, lambda content: content != content.strip())
        yield Variant("with the spaces around the contents kept", at.changed(render=render))


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
    """The mask one place to the left or right, or the trained stretches one longer at their end or shorter in front."""
    at = claim(site, ids.MASK)
    if at is None:
        return
    template, render = at.text.saved_template, at.text.render
    assert template is not None
    trained = template["trained_role"]
    changes: dict[str, Callable[[Text, Rendered, Sequence[Message]], list[int]]] = {
        "one place earlier": lambda _, made, m: [*made.mask[1:], _last(at, made, m[-1]["role"] == trained)],
        "one place later": lambda _, made, __: [0, *made.mask[:-1]],
        "without the last of each stretch": lambda _, made, __: _shorter(made.mask),
    }
    if not jinja_reference.is_program(template):
        name = "with the first token of each reply"
        changes |= {name: lambda now, made, m: _longer(render, now, made.mask, m, trained)}
    for name, change in changes.items():

        def masked(now: Text, messages: Sequence[Message], change: Any = change) -> Rendered:
            made = render(now, messages)
            return Rendered(made.ids, change(now, made, messages))

        candidate = at.changed(render=masked)
        # A mask may be moved in every conversation; one that fits by chance in the first is not.
        if _is_right_everywhere(at, masked):
            yield Variant(f"with the mask {name}", candidate)


def _is_right_everywhere(at: TextSite, render: Render) -> bool:
    """Of all conversations whose ids are right."""
    pairs = ((render(at.text, messages), at.walk.expected_rendering(messages)) for _, messages in at.walk.cases)
    return all(made.mask == mask for made, (found, mask) in pairs if made.ids == found)


def _last(at: TextSite, made: Rendered, trained: bool) -> int:
    """What a mask that was pushed over the end has lost: an end token that was trained."""
    ends = {at.walk.specials[name].id for name in (END_OF_TEXT, END) if name in at.walk.specials}
    return int(trained and made.ids[-1] in ends)


def _shorter(mask: Sequence[int]) -> list[int]:
    return [int(on and after) for on, after in zip(mask, [*mask[1:], 0], strict=True)]


def _longer(render: Render, now: Text, mask: Sequence[int], messages: Sequence[Message], trained: str) -> list[int]:
    """The mask with the first token of every reply, found where each message ends when it is rendered alone."""
    longer, place = list(mask), 0
    for message in messages:
        if message["role"] == trained:
            prefix = len(_frame(render, now, trained).prefix)
            longer[place + prefix] = 1
        place += len(render(now, [message]).ids)
    return longer


# -- A template that says something else -----------------------------------------------


def other_template(site: Site) -> Iterator[tuple[str, str, Variant]]:
    """Undone wherever the rendering is that of a template with one change: name, kind of part, variant."""
    at = _of_turns(site, ids.TEMPLATE)
    if at is None or at.text.saved_template is None:
        return
    for kind, change, template in _altered(at.text.saved_template):
        yield kind, change, Variant(change, at.changed(render=_unless_rendered(at, _by(at, template))))


def _altered(template: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    turns: Mapping[str, Any] = template["turns"]
    parts = {_key(part): part for turn in turns.values() for side in ("prefix", "suffix") for part in turn[side]}
    for part in parts.values():
        for side in ("prefix", "suffix"):
            kind = "end" if side == "suffix" and not isinstance(part, str) else "part"
            without = _each(turns, side, lambda parts, part=part: [p for p in parts if p != part])
            yield kind, f"with {_shown(part)} in the {side} of turns", {**template, "turns": without}
    trained = template["trained_role"]
    for roles, of in ((set(turns), "a turn"), ({trained}, "a reply"), (set(turns) - {trained}, "a prompt")):
        endless = _each({role: turns[role] for role in turns if role in roles}, "suffix", lambda _: [])
        yield "end", f"with what ends {of}", {**template, "turns": {**turns, **endless}}
    for side in ("prefix", "suffix"):
        stripped = _each(turns, side, lambda parts: [p.strip() if isinstance(p, str) else p for p in parts])
        yield "part", f"with the white space in the {side} of turns", {**template, "turns": stripped}
    names = list(turns)
    for one, other in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        swapped = {**turns, one: turns[other], other: turns[one]}
        yield "roles", f"with the turns of {one} and {other} not exchanged", {**template, "turns": swapped}


def _each(turns: Mapping[str, Any], side: str, change: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
    return {role: {**turn, side: change(turn[side])} for role, turn in turns.items()}


def _key(part: Any) -> str:
    return part if isinstance(part, str) else f"special {part['special']}"


def _shown(part: Any) -> str:
    return repr(part) if isinstance(part, str) else f"the special token {part['special']!r}"


def _by(at: TextSite, template: Mapping[str, Any]) -> Callable[[Sequence[Message]], Answer]:
    named = {name: special.id for name, special in at.walk.specials.items()}
    return lambda messages: text_reference.rendered(template, named, at.walk.reference.encode, messages)


def _unless_rendered(at: TextSite, wrong: Callable[[Sequence[Message]], Answer]) -> Render:
    """The candidate's own rendering, but where its ids are exactly those that a certain mistake makes."""
    render, right = at.text.render, at.walk.expected_rendering

    def undone(now: Text, messages: Sequence[Message]) -> Rendered:
        made = render(now, messages)
        return Rendered(*right(messages)) if made.ids == wrong(messages)[0] else made

    return undone


def _of_kind(kind: str) -> Callable[[Site], Iterator[Variant]]:
    return lambda site: (variant for found, _, variant in other_template(site) if found == kind)


def in_front(site: Site, *, alone: bool) -> Iterator[Variant]:
    """Without what the candidate puts before the first turn: one special token alone, or a turn of its own."""
    at = claim(site, ids.TEMPLATE)
    if at is None:
        return
    messages = dict(at.walk.cases)[at.finding.where]
    made, (expected, _) = at.text.render(at.text, messages).ids, at.walk.expected_rendering(messages)
    front = made[: len(made) - len(expected)]
    if not front or made[len(front) :] != expected or (len(front) == 1) != alone:
        return

    def wrong(given: Sequence[Message]) -> Answer:
        found, mask = at.walk.expected_rendering(given)
        return [*front, *found], [*([0] * len(front)), *mask]

    text = at.walk.reference.decode([id for id in front if id not in at.walk.strings.values()])
    what = f"the special token of id {front[0]}" if alone else f"the message {ids.quoted(text)}"
    yield Variant(f"without {what} before the first turn", at.changed(render=_unless_rendered(at, wrong)))


def _roles(at: TextSite) -> tuple[Mapping[str, object], str]:
    template = at.text.saved_template
    assert template is not None
    return template["turns"], template["trained_role"]


# -- Another mask ----------------------------------------------------------------------


def other_mask(name: str) -> Callable[[Site], Iterator[Variant]]:
    """Undone wherever the mask is the one that a certain mistake makes."""

    def variants(site: Site) -> Iterator[Variant]:
        at = claim(site, ids.MASK)
        if at is None:
            return
        render, right, mistake = at.text.render, at.walk.expected_rendering, _MASKS[name]

        def undone(now: Text, messages: Sequence[Message]) -> Rendered:
            made = render(now, messages)
            wrong = made.mask == mistake(right(messages)[1])
            return Rendered(made.ids, right(messages)[1]) if wrong else made

        yield Variant(f"with {name} no more", at.changed(render=undone))

    return variants


def _last_stretch(mask: Sequence[int]) -> list[int]:
    end = max((i for i, on in enumerate(mask) if on), default=-1)
    begin = next((i + 1 for i in range(end, -1, -1) if not mask[i]), 0)
    return [int(on and begin <= i <= end) for i, on in enumerate(mask)]


_MASKS: Mapping[str, Callable[[Sequence[int]], list[int]]] = {
    "every token trained": lambda mask: [1] * len(mask),
    "no token trained": lambda mask: [0] * len(mask),
    "prompts trained and replies not": lambda mask: [1 - on for on in mask],
    "only the last reply trained": _last_stretch,
    "the end of a reply not trained": lambda mask: _shorter(mask),
}
"""What a mistake makes of the true mask."""


def trained_header(site: Site) -> Iterator[Variant]:
    """Undone wherever the mask has just the last few tokens of a reply's header on top of the right ones."""
    at = _of_turns(site, ids.MASK)
    if at is None:
        return
    render, right = at.text.render, at.walk.expected_rendering
    header = len(_frame(render, at.text, _roles(at)[1]).prefix)
    for count in range(1, header + 1):

        def undone(now: Text, messages: Sequence[Message], count: int = count) -> Rendered:
            made, (_, mask) = render(now, messages), right(messages)
            return Rendered(made.ids, mask) if made.mask == _begun_before(mask, count) else made

        if _is_right_everywhere(at, undone):
            which = "the header" if count == header else f"{count} of the {header} header tokens"
            yield Variant(f"without {which} before each reply", at.changed(render=undone))


def _begun_before(mask: Sequence[int], count: int) -> list[int]:
    """Every trained stretch begins `count` places before."""
    return [int(any(mask[place : place + count + 1])) for place in range(len(mask))]


def trained_parts(site: Site) -> Iterator[Variant]:
    """Undone wherever the mask has just the same tokens of each role's turn on top, all of them the template's."""
    at = _of_turns(site, ids.MASK)
    if at is None:
        return
    render, right = at.text.render, at.walk.expected_rendering
    template, _ = _roles(at)
    frames = {role: _frame(render, at.text, role) for role in template}

    def wrong(now: Text, messages: Sequence[Message]) -> list[int]:
        mask = list[int]()
        for message in messages:
            own, frame = right([message])[1], frames[message["role"]]
            after = own[len(own) - len(frame.after) :]
            content = own[len(frame.prefix) : len(own) - len(frame.after)]
            mask += [*_either(own[: len(frame.prefix)], frame.before), *content, *_either(after, frame.after)]
        return mask

    def undone(now: Text, messages: Sequence[Message]) -> Rendered:
        made = render(now, messages)
        return Rendered(made.ids, right(messages)[1]) if made.mask == wrong(now, messages) else made

    if _is_right_everywhere(at, undone):
        yield Variant("without tokens of the template", at.changed(render=undone))


def _either(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [int(a or b) for a, b in zip(one, other, strict=True)]


_RUNGS = (ids.NAME,)
_CHAT = "jaxgpt/chat.py"

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "user text read as special tokens",
        f"encode contents apart from the template, with encode(text) ({_CHAT}, render)",
        _RUNGS,
        ordinary_contents,
    ),
    Repair("template trims content", f"render contents as they are ({_CHAT}, render)", _RUNGS, whole_contents),
    Repair("turn not ended", f"end every turn with its special token ({_CHAT}, Template)", _RUNGS, _of_kind("end")),
    Repair(
        "part of the template missing",
        f"put every part of the template around a content ({_CHAT}, Template)",
        _RUNGS,
        _of_kind("part"),
    ),
    Repair(
        "roles swapped", f"render each message with its own role's turn ({_CHAT}, render)", _RUNGS, _of_kind("roles")
    ),
    Repair(
        "BOS before the template",
        f"put nothing before the first turn that the template does not name ({_CHAT}, render)",
        _RUNGS,
        lambda site: in_front(site, alone=True),
    ),
    Repair(
        "system message added",
        f"render the messages that were given and no others ({_CHAT}, render)",
        _RUNGS,
        lambda site: in_front(site, alone=False),
    ),
    *(
        Repair(
            name,
            f"train the content of replies and the end token after it, nothing else ({_CHAT})",
            _RUNGS,
            other_mask(name),
        )
        for name in _MASKS
    ),
    Repair(
        "header of a reply trained",
        f"train from the first token of a reply's content, nothing of the header before it ({_CHAT}, render)",
        _RUNGS,
        trained_header,
    ),
    Repair(
        "conversation mask off by one",
        f"train the content and the end token after it, nothing else ({_CHAT}, render)",
        _RUNGS,
        moved_mask,
    ),
    Repair(
        "template tokens trained",
        f"train the content of replies and the end token after it, no other part of a turn ({_CHAT}, render)",
        _RUNGS,
        trained_parts,
        last_resort=True,
    ),
)
"""Narrow ones first."""
