import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.chat import TEMPLATES
from jaxgpt.data.encode import encode
from jaxgpt.data.shards import SEAL, TokenShards, read_index, sealed
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

TEXTS = [f"document {i} says {'abc ' * i}" for i in range(1, 30)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=TEXTS)
    encode([path], tmp_path / "out", tokenizer, shard_tokens=300, val_fraction=0.3)
    return tmp_path / "out"


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(sealed(index | changes)))


def refused(folder: Path, split: str = "train") -> str:
    with pytest.raises(InputError) as error:
        TokenShards(folder, split).verify()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_read_across_shards_equals_the_joined_files(folder: Path):
    shards = TokenShards(folder)
    assert len(shards.files) > 3
    whole = np.concatenate([np.fromfile(folder / file["file"], "<u2") for file in shards.files])
    assert shards.tokens == len(whole)
    assert shards.read(0, shards.tokens).dtype == np.int32
    for start, stop in ((0, 5), (290, 1000), (shards.tokens - 3, shards.tokens + 50), (7, 7)):
        assert shards.read(start, stop).tolist() == whole[start:stop].tolist()


def test_documents_are_separated_by_their_recorded_starts(folder: Path):
    shards = TokenShards(folder)
    ends = np.flatnonzero(shards.read(0, shards.tokens) == shards.tokenizer().special("end_of_text").id)
    assert shards.starts.tolist() == [0, *(ends[:-1] + 1).tolist()]
    assert len(ends) == shards.documents


def test_ids_are_little_endian_and_two_bytes_where_they_fit(folder: Path):
    shards = TokenShards(folder)
    assert shards.index["dtype"] == "<u2"
    raw = (folder / "train-00000.bin").read_bytes()
    assert raw[0] + 256 * raw[1] == shards.read(0, 1)[0]


def test_an_id_outside_the_vocabulary_is_refused_where_it_lies(folder: Path):
    path = folder / "train-00001.bin"
    ids = np.fromfile(path, "<u2")
    ids[88] = 50300
    ids.tofile(path)
    shards = TokenShards(folder)
    first = shards.files[0]["tokens"]
    shards.read(0, first + 88)
    with pytest.raises(InputError) as error:
        shards.read(first + 80, first + 95)
    assert str(error.value).startswith(
        f"token 50300 outside vocabulary 0–{shards.vocab_size - 1} (train-00001.bin offset 88)"
    )


@pytest.mark.parametrize("name", ["train-00001.bin", "val-00000.bin", "train-00002.starts"])
def test_every_flipped_bit_fails_verify(folder: Path, name: str):
    path = folder / name
    content = bytearray(path.read_bytes())
    for bit in (0, 8 * len(content) // 2 + 1, 8 * len(content) - 1):
        changed = content.copy()
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert refused(folder, name.split("-")[0]) == f"{path} fails SHA-256; encode the text into a new folder"
    path.write_bytes(content)
    TokenShards(folder).verify()


def test_a_truncated_or_missing_shard_is_refused_when_opened(folder: Path):
    path = folder / "train-00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    assert refused(folder).startswith(f"{path} has {len(content) - 2} bytes, the index says {len(content)}")
    path.unlink()
    assert refused(folder).startswith(f"{path} is missing")


def test_an_index_that_cannot_be_trusted_is_refused(folder: Path, tmp_path: Path):
    assert "holds no index.json; encode text into it with `jaxgpt data encode`" in refused(tmp_path)
    splits = json.loads((folder / "index.json").read_text())["splits"]
    splits["train"]["shards"][0]["file"] = "../x.bin"
    edit_index(folder, splits=splits)
    assert refused(folder) == f"{folder}/index.json names ../x.bin, outside its folder; refused"
    edit_index(folder, version=2)
    assert "has version 2, this program reads 1" in refused(folder)
    (folder / "index.json").write_text("[" * 10**5)
    assert "is not a JSON object" in refused(folder)
    (folder / "index.json").write_text("{}")
    assert "is not an index of token shards" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"dtype": "x"}, "dtype 'x' and vocab_size"),
        ({"dtype": ["<u2"]}, "dtype ['<u2'] and vocab_size"),
        (
            {"vocab_size": "300"},
            "vocab_size '300', expected <u2 or <u4 and 1 to 320; encode the text into a new folder",
        ),
        ({"vocab_size": -1}, "vocab_size -1, expected"),
    ],
)
def test_an_index_of_absurd_ids_is_refused(folder: Path, changes: dict[str, object], got: str):
    edit_index(folder, **changes)
    assert got in refused(folder)


def test_every_flipped_bit_of_the_index_is_refused_or_changes_nothing(folder: Path):
    path = folder / "index.json"
    content, index = path.read_bytes(), read_index(folder)
    refusals = 0
    for bit in range(0, 8 * len(content), 61):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = None
        with suppress(InputError):
            found = read_index(folder)
        refusals += found is None
        assert found is None or {**found, SEAL: index[SEAL]}.items() >= index.items(), bit
    assert refusals > 300


def unsealed(folder: Path, **changes: object) -> None:
    """The index as it was written before it was sealed."""
    index = read_index(folder) | changes
    index.pop(SEAL, None)
    (folder / "index.json").write_text(json.dumps(index))


def test_an_index_without_a_seal_is_believed_of_the_tokenizer_that_its_plan_names(folder: Path):
    state = read_index(folder)["tokenizer"]
    changed = json.loads(json.dumps(state).replace("abc", "abC"))
    assert changed != state
    unsealed(folder)
    TokenShards(folder).verify()
    unsealed(folder, tokenizer=changed)
    assert refused(folder) == f"{folder}/index.json fails SHA-256; encode the text into a new folder"


@pytest.mark.parametrize("value", [None, -1, 1.5, "x", [], {}, True])
@pytest.mark.parametrize("name", ["model_vocab_size", "statistics", "skipped", "plan", "splits", "tokenizer"])
def test_a_part_of_the_index_of_another_type_is_refused(folder: Path, name: str, value: object):
    unsealed(folder, **{name: value})
    assert refused(folder).startswith(f"{folder}/index.json ")


@pytest.mark.parametrize("shards", [5, {}, [5], [{"file": "train-00000.bin"}]])
def test_shards_that_are_none_are_refused(folder: Path, shards: object):
    splits = read_index(folder)["splits"]
    unsealed(folder, splits=splits | {"train": splits["train"] | {"shards": shards}})
    assert (
        "index.json is damaged: a part of it is missing or of another type; encode the text into a new folder"
        in refused(folder)
    )


def test_a_split_without_tokens_is_refused(folder: Path):
    splits = json.loads((folder / "index.json").read_text())["splits"]
    edit_index(folder, splits=splits | {"val": {"tokens": 0, "documents": 0, "shards": []}})
    assert refused(folder, "val") == f"{folder} holds no val tokens; encode with a held-out fraction above 0"


def test_the_fingerprint_is_of_the_hashes_of_the_split(folder: Path):
    shards = TokenShards(folder)
    hashes = [
        hashlib.sha256((folder / file[name]).read_bytes()).hexdigest()
        for file in shards.files
        for name in ("file", "starts")
    ]
    assert shards.fingerprint == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert shards.fingerprint != TokenShards(folder, "val").fingerprint


def test_the_first_shard_is_judged_by_its_own_ids(folder: Path):
    statistics = TokenShards(folder).judge_first_shard(accept=True)
    ids = np.fromfile(folder / "train-00000.bin", "<u2")
    assert (statistics.tokens, statistics.distinct) == (len(ids), len(np.unique(ids)))


def test_the_chat_template_travels_with_the_shards(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text to encode, long enough to say something\n" * 40)
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=[text.read_text()])
    encode(text, tmp_path / "out", tokenizer, template=TEMPLATES["chatml"])
    assert TokenShards(tmp_path / "out").template() == TEMPLATES["chatml"]
