"""Many texts at once have the ids of each alone, wherever long ones are cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import small_vocabularies as small

from jaxgpt.chat import CHATML
from jaxgpt.data import corpus
from jaxgpt.data.encode import encode
from jaxgpt.data.sources import documents
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer_choice import chosen
from jaxgpt.vocabularies import split_rules

LONG = "".join(d.text for d in documents("stdlib") if d.name < "argparse")[:40_000]
TEXTS = [LONG, "", small.TYPED, "日本 語 🎉 'tis  \r\n x" * 300, "a" + " b" * 5000, " " * 9000 + "x"]


def agrees(tokenizer: Tokenizer) -> None:
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("rule", split_rules.RULES)
def test_a_batch_has_the_ids_of_each_text_under_every_rule(rule: str, tmp_path: Path):
    tokenizer, _ = chosen(str(small.as_json(tmp_path, rule)), CHATML)
    agrees(tokenizer)
    agrees(tokenizer.with_added(["self.", "if not"]))


def test_a_batch_has_the_ids_of_each_text_in_the_kinds_without_files():
    agrees(Tokenizer.create("gpt2", template=CHATML))
    agrees(Tokenizer.create("char", template=CHATML, corpus=TEXTS[:1]))


def test_content_tokens_are_found_where_ascii_is_not_normalised(tmp_path: Path):
    tokenizer, _ = chosen(str(small.as_json(tmp_path, "qwen2")), CHATML)
    domain = sorted(tokenizer.encoder.added)
    assert domain, "the vocabulary has content tokens of its own"
    ids = tokenizer.encode_batch(["a".join(domain), "\u00e4".join(domain)])
    for found in ids:
        assert set(found.tolist()) >= {tokenizer.encoder.added[text] for text in domain}
    special = next(iter(tokenizer.encoder.specials))
    assert tokenizer.encoder.specials[special] not in tokenizer.encode_batch([special])[0]


@pytest.mark.parametrize("reaching", ["normalizer", "added token", "edges"])
def test_a_text_is_not_cut_where_something_reaches_over_spaces(reaching: str, tmp_path: Path):
    path = small.as_json(tmp_path, "qwen2") / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    if reaching == "normalizer":
        content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    else:
        note = {"id": 705, "content": "a b" if reaching == "added token" else "[b]", "special": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": reaching == "edges", "normalized": False}
        content["added_tokens"].append(note | flags)
    path.write_text(json.dumps(content), "utf-8")
    tokenizer, _ = chosen(str(path), CHATML)
    texts = ["a" + " b a" * 3000, "a" + " [b] a" * 3000]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_a_long_document_is_encoded_whole_where_a_cut_would_change_its_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "PIECE", 2**14)
    plain, _ = chosen(str(small.as_json(tmp_path / "plain", "qwen2")), CHATML)
    reaching = plain.with_added(["a b"])
    assert plain.cuts_before_spaces
    assert not reaching.cuts_before_spaces
    text = "a b " * (corpus.PIECE // 2)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/long.txt").write_text(text)
    for tokenizer, out in ((plain, tmp_path / "a"), (reaching, tmp_path / "b")):
        encode(tmp_path / "text", out, tokenizer, accept=True)
        ids = np.fromfile(out / "train-00000.bin", "<u2").tolist()
        assert ids == [*tokenizer.encode(text), tokenizer.special("end_of_text").id]
