"""`jaxgpt import`: another program's model as a checkpoint, and the proof that every value arrived.

Where the model lies is seen from what is there: a Hugging Face folder has a
config.json, a PyTorch training script leaves a `.pt` file.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgpt import checkpoint, step_folder, weights
from jaxgpt.array_files import in_bytes
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import Contents
from jaxgpt.errors import InputError, first
from jaxgpt.formats import hf, pt_model
from jaxgpt.formats.folder_links import refuse_links_outside
from jaxgpt.formats.hf import HFModel
from jaxgpt.formats.import_progress import Meter, Progress
from jaxgpt.run_lock import filling
from jaxgpt.step_folder import GOLDEN
from jaxgpt.tokenizer import END_OF_TEXT, ROW_MULTIPLE, Tokenizer
from jaxgpt.vocabularies.kinds import Gpt2Encoder

Dtype = Literal["float32", "bfloat16", "float16"]
_WRITTEN, _HASHED, _SOURCE_READ, _READ_BACK = "written", "hashed", "source read", "read back"
"""What happens to every byte, as `Meter` counts it."""
ASKED_UP_TO = 400_000_000
"""Bytes of weights: beyond it asking would need much more memory than importing, for a CPU computes bfloat16 in
float32 (988 MB of them: 1.2 GiB at the peak without, 2.7 GiB with)."""


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    cast: Dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    verify: bool = False,
    golden: bool | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Make a checkpoint of a model on disk; lines the caller should print.

    Args:
        source: a Hugging Face folder, a `.pt` file, or a folder with one.
        out: the checkpoint to write.
        cast: dtype of the weights; by default those of the file's headers.
        overrides: settings that replace those of the file, e.g. `{"n_head": 12}`.
        verify: read every value back and compare its bits with the source's.
        golden: ask the model its golden prompts, from the checkpoint as it lies on disk; by
            default if its weights have at most `ASKED_UP_TO` bytes.
        progress: called with bytes done and bytes in all: each byte of the weights is
            written, hashed and, to verify, read from the source and from the checkpoint.

    Raises:
        InputError: as `read`; OUT exists and is not empty; the disk is full; a value differs; or an
            export, which nothing asked here changes, answers its golden prompts otherwise than it did.
    """
    source, out = Path(source), Path(out)
    step_folder.refuse_taken(out)
    found = read(source, overrides or {})
    params = {name: _cast(array, cast) for name, array in found.params.items()}
    stages = (_WRITTEN, _HASHED, _SOURCE_READ, _READ_BACK) if verify else (_WRITTEN, _HASHED)
    size = sum(array.nbytes for array in params.values())
    meter = Meter(progress, size, stages)
    with filling(out):
        _save(_contents(source, found, params, cast), out, meter)
        notices = found.notices
        del found, params  # before the checkpoint is read: a cast model would be in memory twice
        if verify:
            notices.append(_verified(source, out, cast, overrides or {}, meter))
        if golden or (golden is None and size <= ASKED_UP_TO):
            notices += _proved(source, out, changed=bool(cast or overrides))
            return notices
    if (source / GOLDEN).is_file():
        notices.append(_unasked(source, "no prompts were asked"))
    if golden is None:
        notices.append(
            f"no golden prompts: asking {in_bytes(size)} of weights takes more memory than an import; "
            f"`jaxgpt.golden_prompts.add({str(out)!r})` in Python does it"
        )
    return notices


def _proved(source: Path, out: Path, *, changed: bool) -> list[str]:
    """Ask the golden prompts of an export, then the checkpoint's own."""
    from jaxgpt import device, golden_prompts  # JAX's compiler, which files alone do not need

    device.keep_programs()
    exported = _asked_again(source, out, changed=changed) if (source / GOLDEN).is_file() else None
    return [notice for notice in (exported, golden_prompts.add(out)) if notice]


def _asked_again(source: Path, out: Path, *, changed: bool) -> str | None:
    """Whether an export still is what was exported; the line to print where nobody can say.

    Raises:
        InputError: it answers otherwise; nothing of the checkpoint is left.
    """
    from jax.errors import JaxRuntimeError

    from jaxgpt import golden_prompts
    from jaxgpt.checks.golden import golden_prompts_test
    from jaxgpt.lm import LM

    if changed:
        return _unasked(source, "another dtype or setting makes another model")
    loaded = checkpoint.load(out, mapped=True)
    try:
        made = golden_prompts.read(source)
        if made and made.compute_dtype != loaded.compute_dtype:
            return _unasked(source, f"made computing in {made.compute_dtype}, imported as {loaded.compute_dtype}")
        line = golden_prompts_test(LM(loaded), source)
        wrong = line.detail if line.status == "FAIL" else ""
    except InputError as error:
        wrong = str(error)
    except (JaxRuntimeError, MemoryError) as error:
        return _unasked(source, " ".join(str(error).split())[:200])
    if wrong:
        shutil.rmtree(loaded.path)
        raise InputError(
            f"{source} is no longer what was exported: {wrong}; if the change is meant, delete its {GOLDEN}"
        )
    return None


def _unasked(source: Path, why: str) -> str:
    return f"{source / GOLDEN} was not asked: {why}"


def _contents(source: str | Path, found: HFModel, params: Mapping[str, np.ndarray], cast: Dtype | None) -> Contents:
    return Contents(
        config=found.config,
        params=params,
        # A template is there for conversations: `chat` shall take it with no further flag.
        stage="sft" if found.template else "base",
        compute_dtype=cast or found.dtype,
        eos_token_ids=found.eos_token_ids,
        tokenizer=found.tokenizer,
        template=found.template,
        provenance={
            "source": str(Path(source).absolute()),
            "model_type": found.model_type,
            **found.kept,
            "format": "hf" if Path(source, "config.json").exists() else "pt",
        },
    )


def _save(contents: Contents, out: Path, meter: Meter) -> None:
    saving = checkpoint.save(out, 0, contents, hashed=partial(meter.add, _HASHED), copy=False)
    meter.watch(_WRITTEN, saving, out)
    saving.result()
    meter.end(_WRITTEN)
    meter.end(_HASHED)


def read(source: str | Path, overrides: Mapping[str, Any]) -> HFModel:
    """The model at `source`, whatever format it is in; arrays are views of the mapped files.

    Raises:
        InputError: nothing there that is read, or as the reader of its format raises.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source} does not exist; give a Hugging Face folder or a .pt file")
    if source.is_dir():
        if step_folder.is_checkpoint(source):
            raise InputError(f"{source} is a jaxgpt checkpoint already; every command takes it as it is")
        if (source / "config.json").exists() or not (files := sorted(source.glob("*.pt"))):
            return hf.read(source, overrides)
        if len(files) > 1:
            raise InputError(
                f"{source} has {len(files)} .pt files ({first([f.name for f in files])}); give one of them"
            )
        refuse_links_outside(source)
        source = files[0]
    if not source.is_file():  # a pipe would wait for whoever writes into it
        raise InputError(f"{source} is a pipe or device; give a Hugging Face folder or a .pt file")
    if source.suffix == ".gguf":
        raise InputError(f"{source} holds tensors without all that a model needs; GGUF is written here, not read")
    if source.suffix == ".safetensors" or (source.suffix == ".bin" and (source.parent / "config.json").exists()):
        raise InputError(f"{source} holds tensors without all that a model needs; give its folder")
    return _from_pt(source, overrides)


def _from_pt(path: Path, overrides: Mapping[str, Any]) -> HFModel:
    """A training script's file; it names no tokenizer, but a vocabulary of GPT-2's size is GPT-2's."""
    found = pt_model.read(path, overrides)
    config, params = hf.translated(found.hf, found.tensors, path.name, found.notices, settings=path.name)
    tokenizer, stops = None, list[int]()
    if Gpt2Encoder.size <= config.vocab_size < Gpt2Encoder.size + ROW_MULTIPLE:
        tokenizer = Tokenizer.create("gpt2", template=TEMPLATES["plain"], model_vocab_size=config.vocab_size)
        stops = [tokenizer.special(END_OF_TEXT).id]
        found.notices.append(f"tokenizer taken to be GPT-2's: the vocabulary has {config.vocab_size:,} ids")
    else:
        found.notices.append(
            f"no tokenizer imported: a .pt file has none, and {config.vocab_size:,} ids are not GPT-2's; "
            "prompts must be token ids"
        )
    dtype = hf.most_common_dtype(params)
    return HFModel("gpt2", config, params, found.tensors, dtype, stops, tokenizer, None, found.notices)


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """`["n_head=12"]` as `{"n_head": 12}`: values are JSON where they can be, else text.

    Raises:
        InputError: a word without `=`.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InputError(f"--set takes KEY=VALUE, got {word!r}")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


def _cast(array: np.ndarray, dtype: Dtype | None) -> np.ndarray:
    if dtype is None:
        return array
    import jax.numpy as jnp

    return array.astype(jnp.dtype(dtype))


def _verified(
    source: str | Path, out: str | Path, cast: Dtype | None, overrides: Mapping[str, Any], meter: Meter
) -> str:
    """Compare the checkpoint on disk with the source, read anew, in the source's own layout.

    By digests, so that the two are never in memory together.

    Raises:
        InputError: values differ, naming the tensors; the checkpoint is left, to look at.
    """

    def digests(stage: str, tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        for name, tensor in tensors:
            found[name] = _digest(tensor)
            meter.add(stage, tensor.nbytes)
        meter.end(stage)
        return found

    # No name for the source's tensors: what is mapped of them goes before the checkpoint comes.
    expected = digests(
        _SOURCE_READ, ((n, _cast(tensor, cast)) for n, tensor in read(source, overrides).tensors.items())
    )
    saved = checkpoint.load(out)
    found = digests(_READ_BACK, weights.hf_tensors(saved.config, saved.params))
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        raise InputError(f"{out} differs from {source} in {len(wrong)} tensors (first: {first(wrong)}); do not use it")
    how = "bit for bit" if cast is None else f"bit for bit after rounding to {cast}"
    values = sum(array.size for array in saved.params.values())
    return f"verified: {values:,} values of {len(expected)} tensors are the source's, {how}"


def _digest(tensor: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape, and SHA-256 of the bits in row order."""
    bits = np.ascontiguousarray(tensor).view(f"u{tensor.itemsize}")
    return str(tensor.dtype), tensor.shape, hashlib.sha256(bits.data).digest()
