"""Rung ids: the text side against independent tokenizers and rules, id by id.

Text to ids and back, the special tokens by name, string and id, what people type
(which must stay ordinary text), conversations with their loss mask, what goes before
a text, and where a reply ends. Everything here is exact: no difference is noise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.chat import Message, Rendered
from jaxgpt.tokenizer import END, END_OF_TEXT, Special
from oracle import jinja_reference, text_probe, text_reference
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reports import wording
from oracle.results import Finding, RungResult
from oracle.site import Site
from oracle.text import Text
from oracle.text_reference import TextReference

NAME = "ids"

ENCODE, USER, DECODE, SPECIALS = "text.encode", "text.user", "text.decode", "text.specials"
PARSE, TEMPLATE, MASK, BOS, STOPS = "text.parse", "text.template", "text.mask", "text.bos", "text.stops"
SAVED = "the saved state"
RAISED = "raised "
"""How a problem begins that is an exception of the candidate's code."""
SHOWN = 40
"""Characters of a text that a message quotes."""


def run(comparison: Comparison) -> RungResult:
    """One finding per claim about the text side, in causal order."""
    text = comparison.candidate.text
    if text is None:
        return RungResult(
            NAME, [], "nothing to compare: the checkpoint has no tokenizer; the other rungs use random ids"
        )
    found = text_reference.references(comparison)
    if not found:
        return RungResult(NAME, [], f"not compared: {text_reference.MISSING}")
    findings = list(Walk(comparison, text, found).findings())
    broken = sum(not finding.ok for finding in findings)
    labels = " and ".join(dict.fromkeys(wording.TOKENIZERS[reference.label] for reference in found))
    what = "tokenizer and chat template" if text.saved_template else "tokenizer (there is no chat template)"
    summary = f"{len(findings)} checks of {what}, {broken} failed, against {labels}"
    return RungResult(NAME, findings, summary)


@dataclass(frozen=True)
class Walk:
    """What is expected of a text side, and the comparison with it."""

    comparison: Comparison
    text: Text
    references: Sequence[TextReference]

    @property
    def reference(self) -> TextReference:
        """Of several the one that says most: the folder the weights came from."""
        return self.references[0]

    @property
    def specials(self) -> dict[str, Special]:
        """By name, as the checkpoint's file says."""
        strings = {id: string for string, id in self.text.saved["special_token_ids"].items()}
        return {name: Special(name, strings[id], id) for name, id in self.text.saved["special_name_ids"].items()}

    @property
    def strings(self) -> dict[str, int]:
        """Special strings and their ids, as the checkpoint's file says."""
        return {special.text: special.id for special in self.specials.values()}

    def findings(self) -> Iterator[Finding]:
        """In causal order."""
        plain, typed = text_probe.texts(self.comparison.seed), text_probe.typed(list(self.strings))
        for reference in self.references:
            yield self._ids(ENCODE, plain, reference, self.text.encode, reference.encode)
            yield self._ids(USER, typed, reference, self.text.encode, reference.encode)
            yield self._decoding([*plain, *typed], reference)
        yield from self._specials()
        yield self._ids(PARSE, typed, self.reference, lambda s: self.text.parse(self.text, s), self.parsed)
        yield from self._conversations()
        yield self._ids(BOS, [*text_probe.HARD[:12], ""], self.reference, self.prompt, self.expected_prompt)
        yield self._stops()

    def _ids(
        self,
        tap: str,
        texts: Sequence[str],
        reference: TextReference,
        ours: Callable[[str], Sequence[int]],
        theirs: Callable[[str], Sequence[int]],
    ) -> Finding:
        """The same ids for every text."""
        wrong: list[str] = []
        for text in texts:
            problem = _attempt(ours, text, lambda ids, text=text: _difference(ids, theirs(text)))
            if problem:
                wrong.append(f"first {quoted(text)}: {problem}")
        share = f"{len(wrong)} of {len(texts)} texts have other ids, {wrong[0]}" if wrong else ""
        return _finding(tap, share, reference.label, len(wrong) / len(texts))

    def _decoding(self, texts: Sequence[str], reference: TextReference) -> Finding:
        """What was encoded comes back, wherever it does in the reference."""
        for text in texts:
            ids = reference.encode(text)
            expected = reference.decode(ids)
            for given, of in ((ids, "the reference's ids"), (self._encoded(text), "its own ids")):
                back = self._decoded(given, expected)
                if back:
                    return _finding(DECODE, f"{quoted(text)}, decoded from {of}, is {back}", reference.label)
        return _finding(DECODE, "", reference.label)

    def _decoded(self, ids: Sequence[int], expected: str) -> str:
        """What is wrong with the text of ids."""
        return _attempt(self.text.decode, ids, lambda back: "" if back == expected else quoted(back))

    def _encoded(self, text: str) -> list[int]:
        try:
            return self.text.encode(text)
        except Exception:
            return []  # is told under text.encode

    def _specials(self) -> Iterator[Finding]:
        yield _finding(SPECIALS, next(self._special_problems(), ""), SAVED)
        for reference in self.references:
            if reference.specials:
                yield _finding(SPECIALS, next(self._foreign(reference), ""), reference.label)

    def _special_problems(self) -> Iterator[str]:
        """Against the checkpoint's own file, and what no tokenizer can be."""
        rows = self.comparison.candidate.config.vocab_size
        for name, saved in self.specials.items():
            found = self.text.specials.get(name)
            if found is None:
                yield f"the candidate has no special token {name} ({saved.text}, id {saved.id})"
            elif (found.text, found.id) != (saved.text, saved.id):
                yield f"{name} is {found.text} with id {found.id}, saved as {saved.text} with id {saved.id}"
            if saved.id >= rows:
                yield f"{saved.text} has id {saved.id}, outside the {rows:,} rows of the embedding"
            back = self._decoded([saved.id], saved.text)
            if back:
                yield f"id {saved.id} of {saved.text} decodes to {back}"
        yield from (f"special token {name} was not saved" for name in self.text.specials.keys() - self.specials.keys())

    def _foreign(self, reference: TextReference) -> Iterator[str]:
        """Against the added tokens of another program's files."""
        ours = {special.text: special.id for special in self.text.specials.values()}
        for string, id in reference.specials.items():
            if string not in ours:
                yield f"the candidate has no token {string}, which is id {id} there"
            elif ours[string] != id:
                yield f"{string} has id {ours[string]}, but {id} there"
        for string, id in ours.items():
            there = reference.token(id)
            if string not in reference.specials and there is not None:
                yield f"{string} has id {id}, which is {quoted(there)} there"

    def parsed(self, text: str) -> list[int]:
        """Ids of text in which special strings stand for themselves."""
        return text_reference.longest_match(text, self.strings, self.reference.encode)

    def _conversations(self) -> Iterator[Finding]:
        template = self.text.saved_template
        if template is None:
            return
        for title, messages in self.cases:
            ids, mask = self.expected_rendering(messages)
            problem = self._rendering(messages, lambda r, ids=ids: _difference(r.ids, ids))
            if not problem and template["name"] == "chatml" and title in text_probe.PLAIN:
                string = self.parsed(text_reference.chatml(messages))
                problem = self._rendering(messages, lambda r, s=string: _difference(r.ids, s))
                problem = problem and f"not ChatML: {problem}"
            yield _finding(TEMPLATE, problem, title)
            yield _finding(MASK, self._rendering(messages, lambda r, ids=ids, mask=mask: _masks(r, ids, mask)), title)

    @property
    def cases(self) -> list[tuple[str, list[Message]]]:
        """The conversations that are compared, by title; of a program's, those it renders with the contents in view."""
        template = self.text.saved_template
        assert template is not None
        if not jinja_reference.is_program(template):
            return list(text_probe.conversations(template["turns"], template["trained_role"], list(self.strings)))
        asked = text_probe.conversations_of_programs(
            template["known_roles"], template["trained_role"], list(self.strings)
        )
        return [(title, messages) for title, messages in asked if self._by_program(template, messages)]

    def _by_program(
        self, template: Mapping[str, Any], messages: Sequence[Message]
    ) -> tuple[list[int], list[int]] | None:
        return jinja_reference.rendered(template, self.strings, self.reference.encode, messages)

    def _rendering(self, messages: Sequence[Message], judge: Callable[[Rendered], str]) -> str:
        if self.text.template is None:
            return "the candidate has no template, but the checkpoint has"
        return _attempt(lambda given: self.text.render(self.text, given), messages, judge)

    def expected_rendering(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids and mask by the checkpoint's `template.json` and the reference's tokenizer."""
        template = self.text.saved_template
        assert template is not None
        if jinja_reference.is_program(template):
            found = self._by_program(template, messages)
            assert found is not None, "only conversations that can be compared are asked about"
            return found
        ids = {name: special.id for name, special in self.specials.items()}
        return text_reference.rendered(template, ids, self.reference.encode, messages)

    def prompt(self, text: str) -> list[int]:
        """What the candidate feeds its model for a text."""
        return self.text.prompt(self.text, text)

    def expected_prompt(self, text: str) -> list[int]:
        """The text's ids after the reference's BOS, if it has the policy; an empty one starts after an end of text."""
        return [*self.reference.front, *self.reference.encode(text)] or [self.specials[END_OF_TEXT].id]

    @property
    def expected_stops(self) -> list[int]:
        """The ids that end a text or a turn, by the checkpoint's and the folders' files."""
        ends = (END_OF_TEXT, END, (self.text.saved_template or {}).get("end_name"))
        named = {self.specials[name].id for name in ends if name in self.specials}
        rows = self.comparison.candidate.config.vocab_size
        places = (self.comparison.source, self.comparison.export)
        found = {id for place in places if place is not None for id in text_reference.stop_ids(place)}
        return sorted(named | {id for id in found if id < rows})

    def _stops(self) -> Finding:
        ours, expected = sorted(self.text.stop_ids), self.expected_stops
        # Without its export, nothing says which ids the checkpoint has noted besides the tokenizer's.
        wrong = ours != expected if self.comparison.export else not set(expected) <= set(ours)
        problem = f"a reply ends at ids {ours}, the files say {expected}" if wrong else ""
        return _finding(STOPS, problem, SAVED)


# -- Differences in words --------------------------------------------------------------


def _finding(tap: str, problem: str, where: str, error: float = 0.0) -> Finding:
    return Finding(tap, tap.removeprefix("text."), ok=not problem, error=error, where=where, problem=problem)


def _attempt(function: Callable[[Any], Any], given: Any, judge: Callable[[Any], str]) -> str:
    """What is wrong with the candidate's answer; an exception of the candidate's code is one."""
    try:
        answer = function(given)
    except MemoryError:
        raise
    except Exception as error:
        return f"{RAISED}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return judge(answer)


def quoted(text: str) -> str:
    """The beginning of a text, printable."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    if list(ours) == list(theirs):
        return ""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"id {place} is {a}, expected {b} ({len(ours)} ids, expected {len(theirs)})"
    return f"{len(ours)} ids {_ids(ours)}, expected {len(theirs)} {_ids(theirs)}"


def _ids(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= 6 else f"[{', '.join(map(str, ids[:6]))}, …]"


def _masks(rendered: Rendered, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Nothing where the ids differ: that is told before. A mask that cannot be proved is refused by training."""
    if rendered.unproved or list(rendered.ids) != list(ids) or list(rendered.mask) == list(mask):
        return ""
    place = next(i for i, (a, b) in enumerate(zip(rendered.mask, mask, strict=False)) if a != b)
    trained = "is trained, expected not" if rendered.mask[place] else "is not trained, expected to be"
    return f"id {ids[place]} at {place} {trained} ({sum(rendered.mask)} trained ids, expected {sum(mask)})"


# -- One place -------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSite(Site):
    """One claim that does not hold."""

    walk: Walk

    @property
    def text(self) -> Text:
        """The candidate's text side as it is."""
        assert self.candidate.text is not None
        return self.candidate.text

    def changed(self, **fields: Any) -> Candidate:
        """The candidate with other fields of its text side."""
        return with_text(self.candidate, **fields)

    def substitute(self) -> Candidate | None:
        """The candidate with what is expected here; None where two references contradict each other."""
        walk = self.walk
        expected: Mapping[str, dict[str, Any]] = {
            ENCODE: {"encode": walk.reference.encode},
            USER: {"encode": walk.reference.encode},
            DECODE: {"decode": walk.reference.decode},
            SPECIALS: {"specials": walk.specials},
            PARSE: {"parse": lambda _, string: walk.parsed(string)},
            TEMPLATE: {"render": lambda _, messages: Rendered(*walk.expected_rendering(messages))},
            MASK: {"render": lambda _, messages: Rendered(*walk.expected_rendering(messages))},
            BOS: {"prompt": lambda _, string: walk.expected_prompt(string)},
            STOPS: {"stop_ids": tuple(walk.expected_stops)},
        }
        changed = self.changed(**expected[self.finding.tap])
        return changed if self.measure(changed).ok else None


def with_text(candidate: Candidate, **fields: Any) -> Candidate:
    """A candidate with other fields of its text side."""
    assert candidate.text is not None
    return replace(candidate, text=replace(candidate.text, **fields))


def site(comparison: Comparison, finding: Finding) -> Site:
    """The claim of a finding."""
    text = comparison.candidate.text
    assert text is not None
    walk = Walk(comparison, text, text_reference.references(comparison))
    return TextSite(comparison, NAME, finding, walk)
