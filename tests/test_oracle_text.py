"""The oracle's rung of ids: true text sides pass, planted faults are found where they are and named."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiktoken
from conftest import GPT2, random_params
from tiktoken_ext import openai_public
from tokenizers import AddedToken, Tokenizer, models

from jaxgpt import checkpoint
from jaxgpt.chat import CHATML, TAGS, TEMPLATES, Message, Rendered, Template, paired_tags
from jaxgpt.checkpoint import Checkpoint, Contents
from jaxgpt.errors import InputError
from jaxgpt.formats import hf
from jaxgpt.tokenizer import Special
from jaxgpt.tokenizer import Tokenizer as OurTokenizer
from oracle import diagnosis, exposure, ladder, noise, text_probe, text_reference
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.faults.catalogue import KINDS
from oracle.reference import Reference
from oracle.reports import terminal, wording
from oracle.results import Report
from oracle.rungs import ids
from oracle.text import Text

pytestmark = pytest.mark.slow

CORPUS = ["Hello wörld user assistant system\n: abc 0123456789"]
TEXT_CLASSES = {fault.name for fault in KINDS["text"]}
NO_MODEL = cast(Reference, None)
"""The rung looks at no model."""


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    # What reaches the disk after a power cut is tested with checkpoints; here it only costs time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def saved(kind: str, template: Template, place: Path) -> Checkpoint:
    tokenizer = OurTokenizer.create(kind, template=template, corpus=CORPUS)
    config = dataclasses.replace(GPT2, vocab_size=tokenizer.model_vocab_size, num_hidden_layers=1)
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    contents = Contents(config, params, "sft", "float32", list(tokenizer.stop_ids), tokenizer, template, {})
    checkpoint.save(place / "run", 0, contents).result()
    loaded = checkpoint.load(place / "run")
    hf.write(loaded, place / "hf")
    return loaded


def compared(loaded: Checkpoint, place: Path, **options: Any) -> Comparison:
    candidate = Candidate(loaded.config, loaded.params, "float32", text=Text.of(loaded))
    given: dict[str, Any] = {"export": place / "hf", "source": None, **options}
    return Comparison(candidate, NO_MODEL, calibration=noise.stored_calibration(), **given)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """GPT-2's vocabulary with ChatML, beside its export."""
    place = tmp_path_factory.mktemp("gpt2")
    return compared(saved("gpt2", CHATML, place), place)


@pytest.fixture(scope="module")
def char(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    place = tmp_path_factory.mktemp("char")
    return compared(saved("char", TAGS, place), place)


def altered(comparison: Comparison, **fields: Any) -> Comparison:
    return dataclasses.replace(comparison, candidate=ids.with_text(comparison.candidate, **fields))


def text_of(comparison: Comparison) -> Text:
    assert comparison.candidate.text is not None
    return comparison.candidate.text


def problems(comparison: Comparison) -> dict[tuple[str, str], str]:
    return {(f.tap, f.where): f.problem for f in ids.run(comparison).findings if not f.ok}


def explained(comparison: Comparison) -> Report:
    return diagnosis.bisect(comparison, rungs=(ids.NAME,))


# -- True text sides -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "char"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_true_text_side_passes_with_every_template(kind: str, template: str, tmp_path: Path):
    found = ids.run(compared(saved(kind, TEMPLATES[template], tmp_path), tmp_path))
    assert [f.problem for f in found.findings if not f.ok] == []
    assert {f.tap for f in found.findings} == {
        "text.encode", "text.user", "text.decode", "text.specials", "text.parse", "text.template", "text.mask",
        "text.bos", "text.stops",
    }  # fmt: skip


def test_other_seeds_generate_other_texts_and_pass(gpt2: Comparison):
    for seed in (1, 2, 3):
        assert problems(dataclasses.replace(gpt2, seed=seed)) == {}
    assert len(text_probe.texts(1)) == len(text_probe.HARD) + 200
    assert text_probe.texts(1) != text_probe.texts(2)


def test_a_model_without_a_tokenizer_passes_and_says_so(gpt2: Comparison):
    bare = dataclasses.replace(gpt2, candidate=dataclasses.replace(gpt2.candidate, text=None))
    found = ids.run(bare)
    assert (found.verdict, found.summary) == (
        "pass",
        "nothing to compare: the checkpoint has no tokenizer; the other rungs use random ids",
    )
    _, hidden = exposure.classes(bare, [ids.NAME])
    assert {hidden[name] for name in TEXT_CLASSES} == {"the checkpoint has no tokenizer"}


def test_a_summary_says_what_was_compared_with_what(gpt2: Comparison, char: Comparison):
    both = ids.run(dataclasses.replace(gpt2, source=gpt2.export)).summary
    tokenizers = "the reference folder's tokenizer and the tokenizer of its own export"
    assert both == f"26 checks of tokenizer and chat template, 0 failed, against {tokenizers}"
    bare = ids.run(dataclasses.replace(altered(gpt2, saved_template=None, template=None), export=None)).summary
    assert bare.endswith(
        "checks of tokenizer (there is no chat template), 0 failed, against GPT-2's published vocabulary"
    )
    assert ids.run(char).summary.endswith("against the rule of a character vocabulary, written a second time")


def test_every_claim_and_what_it_is_held_against_have_plain_words(gpt2: Comparison, char: Comparison):
    found = [f for each in (dataclasses.replace(gpt2, source=gpt2.export), char) for f in ids.run(each).findings]
    assert {f.tap for f in found} == wording.CLAIMS.keys()
    said = {wording.where(f) for f in found}
    assert all(words.startswith(("against the ", "conversation with ")) for words in said)
    assert {f"against {tokenizer}" for name, tokenizer in wording.TOKENIZERS.items() if "GPT" not in name} <= said


def test_a_failure_names_what_was_compared_in_plain_words(gpt2: Comparison):
    report = ladder.climb(altered(gpt2, stop_ids=(0,)), rungs=(ids.NAME,))
    assert next(terminal.lines(report)).startswith(
        "FAIL. First divergence: text.stops, the ids that end a reply (against the checkpoint's and the folder's "
        "files), in the rung ids. A reply ends at ids [0], the files say ["
    )


def test_without_the_reference_library_it_says_what_was_not_compared(
    gpt2: Comparison, char: Comparison, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_reference, "is_installed", lambda: False)
    found = ids.run(gpt2)
    assert (found.verdict, len(found.findings)) == ("pass", 0)
    assert found.summary == "not compared: the package tokenizers is not installed (pip install '.[oracle]')"
    _, hidden = exposure.classes(gpt2, [ids.NAME])
    assert {hidden[name] for name in TEXT_CLASSES} == {text_reference.MISSING}
    assert len(ids.run(char).findings) > 20, "the rule of kind char needs no library"


def test_exposed_are_the_classes_that_the_text_side_has(gpt2: Comparison, char: Comparison):
    exposed, hidden = exposure.classes(gpt2, [ids.NAME])
    assert {"special ids shifted", "wrong pre-tokenizer regex", "roles swapped", "BOS doubled"} <= set(exposed)
    assert hidden["prefix-matching special"] == "no special token begins another"
    hidden = exposure.classes(char, [ids.NAME])[1]
    assert {name for name, reason in hidden.items() if reason == "the tokenizer has no merges"} == {
        "wrong pre-tokenizer regex",
        "merges missing",
        "hex or byte-level vocabulary",
    }


def test_without_a_template_its_classes_are_hidden_and_no_others(gpt2: Comparison):
    assert gpt2.candidate.text is not None
    text = dataclasses.replace(gpt2.candidate.text, saved_template=None)
    bare = dataclasses.replace(gpt2, candidate=dataclasses.replace(gpt2.candidate, text=text))
    exposed, hidden = exposure.classes(bare, [ids.NAME])
    lacking = {name for name, reason in hidden.items() if reason == exposure.NO_TEMPLATE}
    assert {"turn not ended", "roles swapped", "last reply only"} <= lacking <= TEXT_CLASSES
    assert {"empty prompt", "BOS doubled", "text stripped"} <= set(exposed)


# -- The references are independent and right -------------------------------------------


def test_longest_match_is_what_the_tokenizers_library_does():
    specials = {"<|a|>": 1, "<|a|>b": 2, "|>": 3, "<|": 4}
    theirs = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    theirs.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    for text in ("<|a|>b", "<|a|>c<|a|>bb", "x<|a|", "<|<|a|>|>", "", "<|a<|a|>bb|>"):
        ours = text_reference.longest_match(text, specials, lambda piece: [0] if piece else [])
        assert ours == theirs.encode(text).ids, text


def test_the_rendering_by_template_json_is_the_one_of_transformers():
    import transformers

    messages = [Message(role=role, content=f"Hi, {role}.") for role in ("system", "user", "assistant")]
    chatml = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}"
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), chat_template=chatml
    )
    assert text_reference.chatml(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_the_two_ways_of_reading_a_folder_agree(gpt2: Comparison, tmp_path: Path):
    assert gpt2.export is not None
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((gpt2.export / name).read_bytes())
    json_file, files = (text_reference.of_folder(place, "it") for place in (gpt2.export, tmp_path))
    assert json_file is not None
    assert files is not None
    texts = [*text_probe.texts(7), *text_probe.typed(["<|endoftext|>", "<|im_start|>"])]
    assert [json_file.encode(text) for text in texts] == [files.encode(text) for text in texts]
    assert json_file.specials == files.specials
    assert (json_file.front, files.front) == ((), ())


def test_what_stock_transformers_saves_is_the_same_tokenizer(gpt2: Comparison, tmp_path: Path):
    import transformers

    assert gpt2.export is not None
    files = {"vocab": str(gpt2.export / "vocab.json"), "merges": str(gpt2.export / "merges.txt")}
    transformers.GPT2Tokenizer(**files).save_pretrained(tmp_path)
    found = ids.run(dataclasses.replace(gpt2, source=tmp_path))
    assert [f.problem for f in found.findings if not f.ok] == []
    assert sum(f.where == "the reference" for f in found.findings) >= 4


def test_a_reference_with_another_vocabulary_fails_once(gpt2: Comparison, tmp_path: Path):
    assert gpt2.export is not None
    content = json.loads((gpt2.export / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1000]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    report = explained(dataclasses.replace(gpt2, source=tmp_path))
    assert report.verdict == "fail"
    assert [(c.name, c.tap, c.before.where) for c in report.causes] == [
        ("unknown", "text.encode", "the reference"),
        ("unknown", "text.encode", "the export"),
    ]


def test_a_folder_that_puts_bos_first_is_believed(gpt2: Comparison, tmp_path: Path):
    assert gpt2.export is not None
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((gpt2.export / name).read_bytes())
    settings = {"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    report = explained(dataclasses.replace(gpt2, source=tmp_path))
    assert [(c.name, c.tap, c.proved) for c in report.causes] == [("BOS missing", "text.bos", True)]


def test_a_damaged_tokenizer_file_is_bad_input(gpt2: Comparison, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    with pytest.raises(InputError, match=re.escape(f"the tokenizer files of {tmp_path} cannot be read: ")):
        ids.run(dataclasses.replace(gpt2, source=tmp_path))


# -- Planted faults ----------------------------------------------------------------------


def tiktoken_with(pattern: str) -> Callable[[str], list[int]]:
    """GPT-2's ranks behind another regular expression, in the candidate's own library."""
    ours = OurTokenizer.create("gpt2", template=CHATML)
    ranks = {ours.token_bytes(id): id for id in range(50256)}
    return tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def moved(text: Text, by: int, names: Sequence[str] | None = None) -> dict[str, Special]:
    chosen = text.specials if names is None else names
    return {
        name: dataclasses.replace(special, id=special.id + by) if name in chosen else special
        for name, special in text.specials.items()
    }


def only_added(text: Text) -> list[str]:
    return [name for name in text.specials if name != "end_of_text"]


def masked(change: Callable[[list[int]], list[int]]) -> Callable[[Text], Mapping[str, Any]]:
    def fields(text: Text) -> Mapping[str, Any]:
        def render(now: Text, messages: Sequence[Message]) -> Rendered:
            made = text.render(now, messages)
            return Rendered(made.ids, change(made.mask))

        return {"render": render}

    return fields


def contents(change: Callable[[str], str]) -> Callable[[Text], Mapping[str, Any]]:
    def fields(text: Text) -> Mapping[str, Any]:
        def render(now: Text, messages: Sequence[Message]) -> Rendered:
            return text.render(now, [Message(role=m["role"], content=change(m["content"])) for m in messages])

        return {"render": render}

    return fields


def parsing_render(text: Text) -> Mapping[str, Any]:
    def render(now: Text, messages: Sequence[Message]) -> Rendered:
        return text.render(dataclasses.replace(now, encode=lambda string: now.parse(now, string)), messages)

    return {"render": render}


def without_end(mask: list[int]) -> list[int]:
    return [int(on and after) for on, after in zip(mask, [*mask[1:], 0], strict=True)]


def with_prefix(mask: list[int]) -> list[int]:
    return [int(on or after) for on, after in zip(mask, [*mask[1:], 0], strict=True)]


def hexadecimal(text: Text) -> Mapping[str, Any]:
    ours = OurTokenizer.create("gpt2", template=CHATML)
    known = {ours.token_bytes(id): id for id in range(50257)}
    return {"encode": lambda string: [known.get(f"{byte:02x}".encode(), 0) for byte in string.encode()]}


LLAMA3 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"
)
FAULTS: Mapping[str, tuple[Callable[[Text], Mapping[str, Any]], str, str]] = {
    "shifted by one": (lambda t: {"specials": moved(t, 1)}, "text.specials", "special ids shifted"),
    "shifted by a constant": (lambda t: {"specials": moved(t, -40)}, "text.specials", "special ids shifted"),
    "added ones shifted": (
        lambda t: {"specials": moved(t, 2, only_added(t))}, "text.specials", "special ids shifted",
    ),
    "shifted in conversations only": (
        lambda t: {"render": lambda now, m: t.render(dataclasses.replace(now, specials=moved(t, 3)), m)},
        "text.template", "special ids shifted",
    ),
    "exchanged": (
        lambda t: {"specials": {**t.specials, "start": dataclasses.replace(t.specials["start"], id=50258),
                                "end": dataclasses.replace(t.specials["end"], id=50257)}},
        "text.specials", "special ids in another order",
    ),
    "typed tokens obeyed": (
        lambda t: {"encode": lambda s: t.parse(t, s)}, "text.user", "user text read as special tokens",
    ),
    "typed tokens obeyed in conversations": (parsing_render, "text.template", "user text read as special tokens"),
    "contents trimmed": (contents(str.strip), "text.template", "template trims content"),
    "mask one later": (masked(lambda m: [0, *m[:-1]]), "text.mask", "conversation mask off by one"),
    "mask one earlier": (masked(lambda m: [*m[1:], 0]), "text.mask", "conversation mask off by one"),
    "end not trained": (masked(without_end), "text.mask", "the end of a reply not trained"),
    "prefix trained": (masked(with_prefix), "text.mask", "header of a reply trained"),
    "two of the prefix trained": (
        masked(lambda m: with_prefix(with_prefix(m))), "text.mask", "header of a reply trained",
    ),
    "BOS twice": (
        lambda t: {"prompt": lambda now, s: [50256, 50256, *t.encode(s)]}, "text.bos", "BOS doubled",
    ),
    "BOS once": (lambda t: {"prompt": lambda now, s: [50256, *t.encode(s)]}, "text.bos", "BOS added"),
    "end of turn forgotten": (lambda t: {"stop_ids": (50256,)}, "text.stops", "stop id missing"),
    "Llama 3's pattern": (
        lambda t: {"encode": tiktoken_with(LLAMA3)}, "text.encode", "wrong pre-tokenizer regex",
    ),
    "no look-ahead": (
        lambda t: {"encode": tiktoken_with(openai_public.r50k_pat_str.replace(r"|\s++$|\s+(?!\S)|\s", r"|\s+"))},
        "text.encode", "wrong pre-tokenizer regex",
    ),
    "a pattern nobody has": (
        lambda t: {"encode": tiktoken_with(r" ?\S+|\s+(?!\S)|\s+")}, "text.encode", "wrong pre-tokenizer regex",
    ),
    "bytes as hexadecimal digits": (hexadecimal, "text.encode", "hex vs byte-level vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_named_and_proved(gpt2: Comparison, name: str):
    plant, tap, cause = FAULTS[name]
    report = explained(altered(gpt2, **plant(text_of(gpt2))))
    first = report.first_divergence()
    assert report.verdict == "fail"
    assert first is not None
    assert (first["rung"], first["tap"]) == ("ids", tap)
    assert {(c.name, c.proved) for c in report.causes} == {(cause, True)}, [c.to_dict() for c in report.causes]
    assert all(c.tied == [] for c in report.causes)
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


def test_a_special_token_that_another_begins_with_is_matched_whole(tmp_path: Path):
    template = paired_tags(user="<|user|>", assistant="<|user|>x")
    comparison = compared(saved("gpt2", template, tmp_path), tmp_path)
    assert problems(comparison) == {}
    assert "prefix-matching special" in exposure.classes(comparison, [ids.NAME])[0]
    text = text_of(comparison)
    strings = {special.text: special.id for special in text.specials.values()}
    shortest_first = re.compile("|".join(map(re.escape, sorted(strings, key=len))))

    def parse(now: Text, string: str) -> list[int]:
        found, begin = [], 0
        for match in shortest_first.finditer(string):
            found += [*now.encode(string[begin : match.start()]), strings[match[0]]]
            begin = match.end()
        return found + now.encode(string[begin:])

    report = explained(altered(comparison, parse=parse))
    assert [(c.name, c.tap, c.proved) for c in report.causes] == [("prefix-matching special", "text.parse", True)]


def test_special_ids_that_were_saved_wrong_show_against_the_reference_folder(gpt2: Comparison, tmp_path: Path):
    assert gpt2.export is not None
    content = json.loads((gpt2.export / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] += 5 * (token["id"] > 50256)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with_source = dataclasses.replace(gpt2, export=None, source=tmp_path)
    found = problems(with_source)
    assert found == {("text.specials", "the reference"): "<|im_start|> has id 50257, but 50262 there"}
    report = explained(with_source)
    assert [(c.name, c.proved) for c in report.causes] == [("special ids shifted", True)]
    assert report.causes[0].change == "with the added special ids 5 higher, in the saved state too"


def test_kind_char_is_held_against_its_written_rule(char: Comparison):
    text = text_of(char)
    off = altered(char, encode=lambda s: [id + (id >= 256) for id in text.encode(s)])
    found = problems(off)[("text.encode", "the rule of kind char")]
    assert re.fullmatch(r"\d+ of 235 texts have other ids, first ' ': id 0 is 258, expected 257 .+", found)
    assert [c.name for c in explained(off).causes] == ["unknown"]


def test_an_unknown_fault_is_located_and_what_lies_behind_it_is_found_too(gpt2: Comparison):
    text = text_of(gpt2)
    both = altered(gpt2, decode=lambda given: text.decode(given).lower(), specials=moved(text, 1))
    report = explained(both)
    assert [(c.name, c.tap) for c in report.causes] == [
        ("unknown", "text.decode"),
        ("special ids shifted", "text.specials"),
    ]
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


def test_what_the_candidates_code_raises_is_its_fault(gpt2: Comparison):
    def refuses(string: str) -> list[int]:
        raise KeyError(string)

    found = problems(altered(gpt2, encode=refuses))
    assert "first '': raised KeyError" in found[("text.encode", "the export")]
    assert explained(altered(gpt2, encode=refuses)).causes[0].name == "unknown"


def test_an_error_of_the_reference_is_no_fault_of_the_candidate(gpt2: Comparison, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> list[int]:
        raise RuntimeError("a bug of the oracle")

    monkeypatch.setattr(text_reference, "longest_match", broken)
    with pytest.raises(RuntimeError, match="a bug of the oracle"):
        ladder.climb(gpt2, rungs=(ids.NAME,))
