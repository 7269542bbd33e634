import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.chat import TEMPLATES
from jaxgpt.data import encode as encode_module
from jaxgpt.data import shard_writer
from jaxgpt.data.corpus import PIECE, Corpus, cut, place
from jaxgpt.data.encode import Progress, encode
from jaxgpt.data.shards import TokenShards
from jaxgpt.data.sources import Skipped, documents
from jaxgpt.data.statistics import measure
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

SENTENCE = "the quick brown fox jumps over a lazy dog and then sleeps all day in warm sun"


def prose(words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(SENTENCE.split(), words)) + ".\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for i in range(40):
        path = folder / f"{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(prose(20 + 7 * i, i))
    (folder / "long.txt").write_text(prose(PIECE // 3, 99))
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


@pytest.fixture
def tokenizer(source: Path) -> Tokenizer:
    return char(source)


def char(source: Path | str) -> Tokenizer:
    return Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=(d.text for d in documents(source)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as error:
        encode(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def texts_of(shards: TokenShards, tokenizer: Tokenizer) -> list[str]:
    edges = [*shards.starts.tolist(), shards.tokens]
    parts = [shards.read(a, b).tolist() for a, b in itertools.pairwise(edges)]
    assert {ids[-1] for ids in parts} == {tokenizer.special("end_of_text").id}
    return [tokenizer.decode(ids[:-1]) for ids in parts]


def test_every_document_comes_back_and_ends_with_end_of_text(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    report = encode([source], tmp_path / "out", tokenizer, shard_tokens=5000)
    shards = TokenShards(tmp_path / "out")
    assert texts_of(shards, tokenizer) == [d.text for d in documents(source)]
    assert len(shards.files) > 3
    assert (report.statistics.tokens, report.statistics.documents) == (shards.tokens, 41)
    assert report.index["skipped"] == {"count": 1, "shown": "picture.png (NUL at byte 4)"}


def test_text_that_looks_like_a_control_token_is_encoded_as_text(tmp_path: Path):
    text = f"a <|endoftext|> b <|im_end|> c {prose(50, 1)}"
    (tmp_path / "a.txt").write_text(text)
    tokenizer = char(tmp_path / "a.txt")
    encode([tmp_path / "a.txt"], tmp_path / "out", tokenizer)
    ids = TokenShards(tmp_path / "out").read(0, 10**6)
    assert np.isin(ids[:-1], [s.id for s in tokenizer.specials]).sum() == 0
    assert tokenizer.decode(ids[:-1].tolist()) == text


def test_the_number_of_workers_does_not_change_a_byte(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    for workers in (1, 4):
        encode([source], tmp_path / f"{workers}", tokenizer, shard_tokens=5000, val_fraction=0.2, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "4")


@pytest.mark.parametrize("writes", range(1, 12, 2))
def test_an_interrupted_encode_continues_to_identical_bytes(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    settings: dict[str, Any] = {"shard_tokens": 3000, "val_fraction": 0.2}
    encode([source], tmp_path / "whole", tokenizer, **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, writes)
        with pytest.raises(KeyboardInterrupt):
            encode([source], tmp_path / "out", tokenizer, **settings)
    assert not (tmp_path / "out" / "index.json").exists()
    encode([source], tmp_path / "out", tokenizer, **settings)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def stop_after(patch: pytest.MonkeyPatch, writes: int) -> None:
    left = [writes]
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    patch.setattr(Path, "replace", interrupted)


def test_finished_shards_are_not_encoded_again(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 16)  # the plan, then five shards of three files each
        with pytest.raises(KeyboardInterrupt):
            encode([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    assert len(kept) == 5
    done: list[int] = []
    encode(
        [source],
        tmp_path / "out",
        tokenizer,
        shard_tokens=3000,
        progress=lambda p: done.append(p.tokens if p.stage == "encoding" else 0),
    )
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert next(n for n in done if n) > 15_000


def test_a_finished_shard_that_was_damaged_is_encoded_again(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode([source], tmp_path / "whole", tokenizer, shard_tokens=3000)
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        with pytest.raises(KeyboardInterrupt):
            encode([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    path = tmp_path / "out" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[::-1])
    encode([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def interrupted(source: Path, out: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 16)  # the plan, then five shards of three files each
        with pytest.raises(KeyboardInterrupt):
            encode([source], out, tokenizer, shard_tokens=3000)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", "next", "old"])
def test_a_shard_whose_record_was_damaged_is_encoded_again(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    encode([source], tmp_path / "whole", tokenizer, shard_tokens=3000)
    interrupted(source, tmp_path / "out", tokenizer, monkeypatch)
    path = tmp_path / "out" / "partial" / "train-00004.json"
    record = json.loads(path.read_text())
    if damage == "next":
        record["next"][0] -= 1
    if damage == "old":
        del record["sha256"]
    path.write_text(json.dumps(record) if damage in ("next", "old") else damage)
    encode([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["{", "[]", "\xff", "[" * 10**5])
def test_a_damaged_plan_or_index_is_one_line_that_names_it(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    out = tmp_path / "out"
    interrupted(source, out, tokenizer, monkeypatch)
    plan, index = out / "partial" / "plan.json", out / "index.json"
    whole = plan.read_bytes()
    plan.write_bytes(damage.encode("latin-1"))
    text = refused([source], out, tokenizer, shard_tokens=3000)
    assert text == f"{plan} is not a JSON object; remove {out} or choose another folder"
    plan.write_bytes(whole)
    encode([source], out, tokenizer, shard_tokens=3000)
    index.write_bytes(damage.encode("latin-1"))
    text = refused([source], out, tokenizer, shard_tokens=3000)
    assert text == f"{index} is not a JSON object; encode the text into a new folder"


def test_a_pipe_in_place_of_the_plan_is_refused(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "out" / "partial").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / "partial" / "plan.json")
    assert "plan.json is a folder, pipe or device, not a file;" in refused([source], tmp_path / "out", tokenizer)


def encode_slowly(source: Path, out: Path) -> None:
    encode_module.SAMPLE_TOKENS = 100
    encode([source], out, char(source), shard_tokens=1000, progress=lambda _: time.sleep(0.002))


def test_an_encode_killed_with_sigkill_continues_to_identical_bytes(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    encode([source], tmp_path / "whole", tokenizer, shard_tokens=1000)
    child = multiprocessing.get_context("spawn").Process(target=encode_slowly, args=(source, tmp_path / "out"))
    child.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("partial/train-*.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert (tmp_path / "out" / "partial" / "train-00000.json").exists()
    encode([source], tmp_path / "out", tokenizer, shard_tokens=1000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_finished_encode_is_returned_as_it_is(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    before = encode([source], tmp_path / "out", tokenizer)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert encode([source], tmp_path / "out", tokenizer) == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == stamps


@pytest.mark.parametrize("finished", [True, False])
def test_an_encode_of_other_data_is_never_mixed_in(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 10**9 if finished else 4)
        if finished:
            encode([source], out, tokenizer, shard_tokens=3000)
        else:
            with pytest.raises(KeyboardInterrupt):
                encode([source], out, tokenizer, shard_tokens=3000)
    before = content(out)
    assert "other shard_tokens;" in refused([source], out, tokenizer, shard_tokens=3001)
    other = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=[prose(100, 0), "Ω"])
    assert "other tokenizer;" in refused([source], out, other, shard_tokens=3000, accept=True)
    path = source / "long.txt"
    path.write_text(path.read_text()[:-2] + "!\n")
    text = refused([source], out, tokenizer, shard_tokens=3000)
    assert text == f"{out} holds an encode with other sources; remove it or choose another folder"
    assert content(out) == before


def test_a_folder_with_other_files_is_refused(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "is not empty and holds no encoded text" in refused([source], tmp_path / "out", tokenizer)
    assert "lies inside the source" in refused([source], source / "out", tokenizer)


# -- The held-out split ----------------------------------------------------------------


def test_the_held_out_split_goes_by_name_and_stays_when_files_are_added(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
):
    encode([source], tmp_path / "a", tokenizer, val_fraction=0.3)
    (source / "0" / "new.txt").write_text(prose(50, 7))
    (source / "zz.txt").write_text(prose(50, 8))
    encode([source], tmp_path / "b", tokenizer, val_fraction=0.3)
    new = {prose(50, 7), prose(50, 8)}
    for split in ("train", "val"):
        before = texts_of(TokenShards(tmp_path / "a", split), tokenizer)
        after = texts_of(TokenShards(tmp_path / "b", split), tokenizer)
        assert [text for text in after if text not in new] == before
    assert 4 <= TokenShards(tmp_path / "a", "val").documents <= 22


def test_the_held_out_share_is_the_fraction(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 2000)
    splits = [item[0] for item in Corpus((tmp_path / "x.jsonl",), 0.3).documents() if not isinstance(item, Skipped)]
    assert splits.count("val") / 2000 == pytest.approx(0.3, abs=0.03)


def test_of_a_single_text_file_the_end_is_held_out(tmp_path: Path):
    lines = [prose(8, i) for i in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    tokenizer = char(tmp_path / "a.txt")
    encode([tmp_path / "a.txt"], tmp_path / "out", tokenizer, val_fraction=0.1)
    (train,), (val,) = (texts_of(TokenShards(tmp_path / "out", split), tokenizer) for split in ("train", "val"))
    assert train + val == "".join(lines)
    assert train.endswith("\n")
    assert 0.09 < len(val) / len(train + val) < 0.12


def test_of_few_documents_the_one_with_the_lowest_place_is_held_out(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    texts = [prose(50, i) for i in range(6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = char(path)
    encode([path], tmp_path / "few", tokenizer, val_fraction=1e-9)
    places = {place(item[1].name): item[1].text for item in Corpus((path,), 0).documents() if isinstance(item, tuple)}
    (held_out,) = texts_of(TokenShards(tmp_path / "few", "val"), tokenizer)
    assert held_out == places[min(places)]
    assert texts_of(TokenShards(tmp_path / "few", "train"), tokenizer) == [text for text in texts if text != held_out]


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": prose(50, 0)}) + "\n")
    tokenizer = char(path)
    text = refused([path], tmp_path / "out", tokenizer, val_fraction=0.001)
    assert "val_fraction 0.001 of 1 documents leaves none for val; choose a larger --val-fraction or give" in text
    assert not (tmp_path / "out").exists()


# -- Judged before the rest ------------------------------------------------------------


def test_text_the_vocabulary_lacks_is_refused_before_anything_is_written(source: Path, tmp_path: Path):
    foreign = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=["abcdefghijkl "])
    text = refused([source], tmp_path / "out", foreign)
    assert text.startswith("first ")
    assert "tokens are unknown, expected at most 1%; likely cause: the vocabulary was made for other text" in text
    assert not (tmp_path / "out").exists()
    report = encode([source], tmp_path / "out", foreign, accept=True)
    assert report.statistics.unknown > 0.01
    with pytest.raises(InputError, match=r"train-00000.bin: .* are unknown"):
        TokenShards(tmp_path / "out").judge_first_shard()
    assert TokenShards(tmp_path / "out").judge_first_shard(accept=True).unknown > 0.01


def test_text_that_repeats_itself_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ab" * 6000 + "c")
    tokenizer = char(tmp_path / "a.txt")
    text = refused([tmp_path / "a.txt"], tmp_path / "out", tokenizer)
    assert "entropy is 1.00" in text
    assert "expected at least 2; likely cause: the text repeats itself" in text
    (tmp_path / "a.txt").write_text("ab" * 3000)
    encode([tmp_path / "a.txt"], tmp_path / "out", tokenizer)  # too few tokens to tell


def test_the_sample_is_the_first_100_documents_or_32k_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.jsonl"
    samples: list[Any] = []
    rows = [json.dumps({"text": prose(20, i)}) + "\n" for i in range(150)]
    path.write_text("".join(rows))
    tokenizer = char(path)
    encode([path], tmp_path / "a", tokenizer, progress=lambda p: samples.append(p.sample))
    assert samples[-1].documents == 100
    path.write_text("".join(json.dumps({"text": prose(2000, i)}) + "\n" for i in range(150)))
    encode([path], tmp_path / "b", tokenizer, progress=lambda p: samples.append(p.sample))
    assert samples[-1].documents < 10
    assert 32_768 <= samples[-1].tokens < 50_000


def test_a_malformed_last_row_is_refused_before_anything_is_written(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text((json.dumps({"text": prose(20, 0)}) + "\n") * 500 + '{"text": "trunc')
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=[prose(100, 0)])
    text = refused([path], tmp_path / "out", tokenizer)
    assert text.startswith(f"{path}:501 is not JSON")
    assert not (tmp_path / "out").exists()


def test_statistics_are_those_of_the_definition():
    counts = np.array([4, 2, 2, 0, 0, 0, 0, 0])
    statistics = measure(counts, 3, np.array([1, 7]))
    assert statistics.to_dict() == {
        "tokens": 8,
        "documents": 3,
        "distinct": 3,
        "entropy": 1.5,
        "uniform_entropy": 3.0,
        "unknown": 0.25,
    }
    assert str(statistics) == "8 tokens, 3 documents, 3 distinct ids, entropy 1.50 of 3.00 bits, unknown 25.00%"


# -- The rest --------------------------------------------------------------------------


def test_progress_reaches_its_total(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    seen: list[Progress] = []
    encode([source], tmp_path / "out", tokenizer, progress=seen.append)
    assert {p.stage for p in seen} == {"reading", "encoding"}
    last = seen[-1]
    assert last.done == last.total == sum(len(d.text) for d in documents(source))
    assert last.tokens == TokenShards(tmp_path / "out").tokens
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)


@pytest.mark.parametrize("text", ["aa bb\r\ncc  dd\n\n ee 'f 5 6 " * 50, "xyz" * 100, " " * 300, "日本 語" * 60])
def test_pieces_of_a_long_text_join_to_it(text: str):
    pieces = list(cut(text, 16))
    assert "".join(pieces) == text
    assert all(len(piece) >= 16 for piece in pieces[:-1])


def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(source: Path):
    tokenizer = Tokenizer.create("gpt2", template=TEMPLATES["chatml"])
    text = "".join(d.text for d in documents("stdlib") if d.name < "asyncio")[:200_000] + "日本 語 🎉 'tis  \r\n x" * 20
    pieces = list(cut(text, 500))
    assert len(pieces) > 100
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_full_disk_is_one_line_and_the_encode_continues_later(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode([source], tmp_path / "whole", tokenizer, shard_tokens=3000)
    with monkeypatch.context() as patch:
        fsyncs = [0]

        def full(_: int) -> None:
            fsyncs[0] += 1
            if fsyncs[0] > 20:
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(shard_writer.os, "fsync", full)
        text = refused([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    assert "was not saved: disk full (need " in text
    assert not list((tmp_path / "out").rglob(".*tmp"))
    encode([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("after", [0, 20])
def test_a_write_that_fails_is_one_line_and_the_encode_continues_later(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
):
    encode([source], tmp_path / "whole", tokenizer, shard_tokens=3000)
    with monkeypatch.context() as patch:
        left = iter(range(after))

        def failing(_: int) -> None:
            if next(left, None) is None:
                raise OSError(number, os.strerror(number))

        patch.setattr(shard_writer.os, "fsync", failing)
        text = refused([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    assert f" was not saved: {os.strerror(number)}; put that right and run the same command again" in text
    assert not list((tmp_path / "out").rglob(".*tmp"))
    encode([source], tmp_path / "out", tokenizer, shard_tokens=3000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_one_line(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    text = refused([source], tmp_path / "file" / "out", tokenizer)
    assert text == f"{tmp_path}/file/out/partial cannot be made (Not a directory); choose another folder"


def test_encoded_text_needs_no_other_input(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    encode([source], tmp_path / "out", tokenizer)
    shutil.rmtree(source)
    shards = TokenShards(tmp_path / "out")
    assert shards.tokenizer().state() == tokenizer.state()
    assert shards.tokenizer().model_vocab_size == tokenizer.model_vocab_size
