"""Checkpoints: saved without stopping the run, counted once whole, checked before they are read.

A step is written into `.step-00000120.partial`, hashed, forced to disk and renamed;
only then is it acknowledged. `jaxgpt.step_folder` says what lies in it, and Orbax reads
nothing that was not verified before.

Of several processes the first decides, hashes and renames; all of them write arrays.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgpt import array_files, manifest, processes, step_folder, weights
from jaxgpt.array_files import Header, in_bytes
from jaxgpt.chat import Template
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.orbax_arrays import begin as _begin_arrays
from jaxgpt.orbax_arrays import dtype_of
from jaxgpt.orbax_arrays import read as _read_arrays
from jaxgpt.step_folder import DTYPES, CheckpointError, Contents, describe, latest, steps
from jaxgpt.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Contents",
    "Saving",
    "describe",
    "latest",
    "load",
    "prepare",
    "save",
    "steps",
]

_BLOCK = 4096
"""Bytes in which a file system hands out space."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified step; arrays are numpy, in the dtype they were saved in."""

    path: Path
    step: int
    config: ModelConfig
    stage: str
    compute_dtype: str
    eos_token_ids: list[int]
    tokenizer: Tokenizer | None
    template: Template | None
    provenance: dict[str, Any]
    params: dict[str, np.ndarray]
    train: dict[str, np.ndarray] | None = None
    """Read only when asked for."""
    train_json: dict[str, Any] | None = None
    notices: list[str] = field(default_factory=list[str])
    """Lines the caller should print: newer steps that were passed over."""


# -- Saving ----------------------------------------------------------------------------


class Saving:
    """A save under way."""

    def __init__(self, future: "Future[Path]"):
        self._future = future

    def ended(self, *, within: float) -> bool:
        """Whether the step counts or failed, after waiting for it so many seconds at most."""
        return bool(wait([self._future], within).done)

    def result(self) -> Path:
        """Wait until the step counts; its folder.

        Raises:
            CheckpointError: it was not saved; nothing of it is left, and older steps stand.
        """
        return self._future.result()


def save(
    directory: str | Path,
    step: int,
    contents: Contents,
    *,
    keep: int = 2,
    score: float | None = None,
    hashed: Callable[[int], None] | None = None,
    copy: bool = True,
) -> Saving:
    """Begin to save a step; arrays may be donated or changed as soon as this returns.

    When the step counts, all but the last `keep` and the best are deleted. One save at
    a time: wait for the result before the next into the same folder.

    Args:
        directory: the run folder.
        step: not negative; a finished step of that number is replaced.
        contents: what to save.
        keep: newest steps to keep, at least 1.
        score: of this step, less is better; None for none.
        hashed: told, on another thread, the bytes of each file when it was hashed.
        copy: False takes no memory for numpy arrays, which nobody may change until the step counts.

    Raises:
        CheckpointError: contents that could not be loaded again.
    """
    directory = Path(directory).absolute()
    _check(contents)
    partial, final = directory / f".step-{step:08d}.partial", directory / f"step-{step:08d}"
    future: Future[Path] = Future()
    try:
        documents = step_folder.documents(step, contents, score)
        _begin(directory, contents)
        written = _begin_arrays(partial, contents, copy)
    except Exception as error:
        future.set_exception(_not_saved(directory, step, contents, partial, error))
        return Saving(future)

    def finish() -> None:
        try:
            written.result()
            if processes.first():
                for name, text in documents.items():
                    (partial / name).write_text(text, "utf-8")
                _seal(partial, hashed)
                acknowledge(partial, final)
        except BaseException as error:
            future.set_exception(_not_saved(directory, step, contents, partial, error))
            return
        # A step that cannot be deleted is no reason to doubt the one that was saved.
        with suppress(OSError):
            _thin(directory, step, keep)
        future.set_result(final)

    try:
        threading.Thread(target=finish, name=f"save step {step}").start()
    except RuntimeError:  # there may be no more of them; then the run waits
        finish()
    return Saving(future)


def _begin(directory: Path, contents: Contents) -> None:
    """What the first process does before all of them write, and what keeps all of them from it."""
    problem = None
    if processes.first():
        try:
            _clean(directory)
            _require_space(directory, contents)
        except OSError as error:
            problem = error
    if processes.any_of(problem is not None):
        raise problem or OSError("the first process could not begin to save")


def prepare(directory: str | Path, contents: Contents, *, saves: int, keep: int) -> None:
    """Before a run: remove what a killed one left, and refuse a folder without room for its steps.

    Args:
        directory: the run folder; made where there is none.
        contents: of any step: all are of one size.
        saves: still to come.
        keep: newest steps to keep.

    Raises:
        CheckpointError: what is needed, and what is free.
    """
    directory = Path(directory).absolute()
    _clean(directory)
    # The oldest is deleted when the newest counts: for a moment there is one more than is kept.
    present = len(steps(directory))
    more = max(1, min(saves + present, keep + 1) - present)
    size, free = _bytes(contents), shutil.disk_usage(directory).free
    if more * size > free:
        needed = f"{more} checkpoints of {in_bytes(size)}" if more > 1 else f"a checkpoint of {in_bytes(size)}"
        raise CheckpointError(
            f"{directory} needs room for {needed}, {in_bytes(free)} free; make room, keep fewer (--keep), "
            "or give another --out"
        )


def _check(contents: Contents) -> None:
    if contents.stage not in step_folder.STAGES or contents.compute_dtype not in DTYPES:
        raise CheckpointError(f"stage {contents.stage!r} or compute dtype {contents.compute_dtype!r} is unknown")
    tokenizer, rows = contents.tokenizer, contents.config.vocab_size
    if tokenizer is not None and tokenizer.model_vocab_size != rows:
        raise CheckpointError(f"tokenizer has {tokenizer.model_vocab_size:,} tokens, model embeds {rows:,}")
    _compare(contents.config, {name: Header(a.shape, str(a.dtype)) for name, a in contents.params.items()}, "array")
    for name, array in (contents.train or {}).items():
        if not array_files.NAME.fullmatch(name) or not array.size:
            raise CheckpointError(f"training state {name!r} of shape {list(array.shape)} cannot be saved")


def _seal(partial: Path, hashed: Callable[[int], None] | None) -> None:
    """Hash, after a look whether `load` would take it: another Orbax may store otherwise."""
    sizes = {name: path.stat().st_size for name, path in manifest.files(partial).items()}
    for tree in ("params", "train"):
        if (partial / tree).exists():
            array_files.headers(partial / tree, _below(tree, sizes))
    # Orbax notes there the path of the partial folder, which means nothing elsewhere.
    (partial / "commit_success.txt").unlink(missing_ok=True)
    manifest.seal(partial, hashed)


def acknowledge(partial: Path, final: Path) -> Path:
    """Put a sealed step in its place; one that stood there counts until then, and is deleted."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    manifest.sync(final.parent)
    _delete(replaced)
    return final


def _clean(directory: Path) -> None:
    """Make the folder, and remove what a killed process left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, path in step_folder.folders(directory).items():
        if step_folder.REPLACED.fullmatch(path.name):
            os.rename(path, directory / f"step-{number:08d}")
    for path in step_folder.leftovers(directory):
        _delete(path)


def _thin(directory: Path, saved: int, keep: int) -> None:
    """The first process deletes all steps but the one just saved, the last `keep` and the best."""
    if not processes.first():
        return
    found = step_folder.folders(directory)
    scores = {number: score for number, path in found.items() if (score := step_folder.score_of(path)) is not None}
    best = min(scores, key=lambda number: (scores[number], number), default=None)
    for number in found.keys() - {saved, best, *sorted(found)[-keep:]}:
        # Renamed first: a kill in the middle must not leave half a step that counts.
        trash = directory / f".step-{number:08d}.trash"
        os.rename(found[number], trash)
        _delete(trash)


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # a file in the place of a folder
        path.unlink()


def _require_space(directory: Path, contents: Contents) -> None:
    if _bytes(contents) > shutil.disk_usage(directory).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bytes(contents: Contents) -> int:
    """Disk space of the arrays, with a block each for two files and three folders."""
    arrays = [*contents.params.values(), *(contents.train or {}).values()]
    return sum((-(-array.nbytes // _BLOCK) + 5) * _BLOCK for array in arrays)


def _not_saved(directory: Path, step: int, contents: Contents, partial: Path, error: BaseException) -> CheckpointError:
    """What is said of a save that failed. It must not raise: whoever waits for the step would wait for ever."""
    for _ in range(50):
        left = [*directory.glob(f"{partial.name}*")]
        if not left:
            break
        for path in left:
            _delete(path)
        time.sleep(0.1)  # the first failure is told while Orbax writes the rest, and makes folders anew
    good = steps(directory)
    last = f"last good step {good[-1]}" if good else "no step was saved before"
    full = any(number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text for number, text in _chain(error))
    if full:
        reason = f"disk full (need {in_bytes(_bytes(contents))}, {_free(directory)} free)"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    problem = CheckpointError(f"step {step} was not saved: {reason}; {last}")
    problem.__cause__ = error
    return problem


def _free(directory: Path) -> str:
    try:
        return in_bytes(shutil.disk_usage(directory).free)
    except OSError:  # the folder is gone
        return "unknown"


def _chain(error: BaseException | None) -> Iterator[tuple[int | None, str]]:
    while error is not None:
        yield getattr(error, "errno", None), str(error)
        error = error.__cause__ or error.__context__


# -- Loading ---------------------------------------------------------------------------


def load(
    directory: str | Path,
    *,
    train: bool = False,
    step: int | None = None,
    cast: Literal["float32", "bfloat16", "float16"] | None = None,
    fallback: bool = False,
    mapped: bool = False,
    tidy: bool = True,
) -> Checkpoint:
    """Load a step after everything about it was checked.

    Args:
        directory: a run folder, or one step's folder.
        train: read the training state as well, and remove what a killed process left.
        tidy: False leaves that, and damaged steps, to another process of the same run.
        step: which; the newest if None.
        cast: convert parameters to this dtype.
        fallback: pass over steps that fail their manifest, with a notice for each.
        mapped: leave parameters on disk until they are used; they are then read-only.

    Raises:
        CheckpointError: no such step, or one that fails a check; the file is named.
    """
    directory = Path(directory).absolute()
    if train and tidy and steps(directory):
        _clean(directory)
    verified = verify(directory, train=train, step=step, fallback=fallback)
    found = read(verified, cast=cast, mapped=mapped)
    if train and tidy:
        _set_aside(verified.damaged)
    return found


@dataclass(frozen=True)
class Verified:
    """A step of which every file is what its manifest says."""

    path: Path
    sizes: Mapping[str, int]
    """Bytes of each file."""
    manifest: bytes
    """What the step's manifest was."""
    train: bool
    """Whether its training state is verified, too."""
    damaged: Sequence[Path]
    """Newer steps, which are not."""
    problems: Sequence[str]
    """What is wrong with each of those."""


def verify(
    directory: str | Path,
    *,
    train: bool = False,
    step: int | None = None,
    fallback: bool = False,
    stop: threading.Event | None = None,
) -> Verified:
    """The first half of `load`, which imports nothing: a thread may do it while others import what `read` needs.

    Once `stop` is set, it ends soon.
    """
    candidates = step_folder.candidates(Path(directory).absolute(), step)
    problems: list[str] = []
    for number, path in enumerate(candidates):
        try:
            said = _said(path)
            sizes = manifest.verify(path, unhashed=() if train else ("train",), stop=stop)
        except InputError as error:
            problems.append(f"{step_folder.title(path)}: {error}")
            if fallback and path != candidates[-1]:
                continue
            remedy = "no verified step is left" if fallback else "restore it or load an older step"
            raise CheckpointError(f"{'; '.join(problems)}; {remedy}") from None
        return Verified(path, sizes, said, train, candidates[:number], problems)
    raise AssertionError("there is at least one candidate")


def _set_aside(damaged: Sequence[Path]) -> None:
    """Damaged steps stop counting, so that training from an older one does not count them as newest."""
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        _delete(aside)
        os.rename(path, aside)


def _said(path: Path) -> bytes:
    try:
        return (path / manifest.MANIFEST).read_bytes()
    except OSError:
        return b""


def read(verified: Verified, *, cast: str | None = None, mapped: bool = False) -> Checkpoint:
    """The second half of `load`."""
    try:
        return _read(verified, cast=cast, mapped=mapped)
    except (InputError, OSError) as error:
        # A run thins its steps and may save one anew; then no file's own trouble is what matters.
        _refuse_replaced(verified)
        message = error if isinstance(error, InputError) else ": ".join(filter(None, (error.filename, error.strerror)))
        raise CheckpointError(f"{step_folder.title(verified.path)}: {message}") from None


def _refuse_replaced(verified: Verified) -> None:
    if _said(verified.path) != verified.manifest:
        raise CheckpointError(
            f"{step_folder.title(verified.path)} was removed or saved anew while it was being loaded; load again"
        )


def _read(verified: Verified, *, cast: str | None, mapped: bool) -> Checkpoint:
    path, sizes, train = verified.path, verified.sizes, verified.train
    described = step_folder.read(path)
    config = described.config
    headers = array_files.headers(path / "params", _below("params", sizes))
    _compare(config, headers, "file")
    _compare_dtypes(headers, described.dtypes, cast)
    params = _params(path, headers, mapped=mapped)
    state = None
    if train and (path / "train").is_dir():
        state = _read_arrays(path, "train", array_files.headers(path / "train", _below("train", sizes)))
    train_json = step_folder.document(path, step_folder.TRAIN) if train else None
    _refuse_replaced(verified)
    if cast is not None:
        params = {key: array.astype(dtype_of(cast)) for key, array in params.items()}
    return Checkpoint(
        path=path,
        step=described.step,
        config=config,
        stage=described.stage,
        compute_dtype=described.compute_dtype,
        eos_token_ids=described.eos_token_ids,
        tokenizer=described.tokenizer,
        template=described.template,
        provenance=described.provenance,
        params=params,
        train=state,
        train_json=train_json,
        notices=[f"{problem}; using verified step {described.step}" for problem in verified.problems],
    )


def _compare(config: ModelConfig, headers: Mapping[str, Header], source: str) -> None:
    """Refuse arrays that are not exactly the model's parameters; all differences in one line."""
    if config.num_hidden_layers > len(headers):
        # Before the names of that many layers are spelled out.
        raise CheckpointError(f"model has {config.num_hidden_layers:,} layers, {source} has {len(headers)} arrays")
    expected = {p.name: p.shape for p in weights.parameters(config)}
    problems = [f"params.{name}: missing" for name in expected if name not in headers]
    problems += [f"params.{name}: not in the model" for name in sorted(headers.keys() - expected.keys())]
    for name, shape in expected.items():
        if name in headers and headers[name].shape != shape:
            problems.append(f"params.{name}: {source} {_brackets(headers[name].shape)}, model {_brackets(shape)}")
        elif name in headers and headers[name].dtype not in DTYPES:
            problems.append(f"params.{name}: {source} {headers[name].dtype}, expected one of {', '.join(DTYPES)}")
    if problems:
        raise CheckpointError("; ".join([*problems[:3], *([f"+{len(problems) - 3} more"] if problems[3:] else [])]))


def _brackets(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _compare_dtypes(headers: Mapping[str, Header], requested: Mapping[str, str], cast: str | None) -> None:
    for name, header in headers.items():
        wanted = requested.get(name)
        if header.dtype != wanted and cast is None:
            raise InputError(
                f"params.{name} is {header.dtype}, requested {wanted}; `jaxgpt export --dtype {wanted}` casts it, "
                "`jaxgpt import` makes a checkpoint of that"
            )


def _below(tree: str, sizes: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix(f"{tree}/"): size for name, size in sizes.items() if name.startswith(f"{tree}/")}


def _params(path: Path, headers: Mapping[str, Header], *, mapped: bool) -> dict[str, np.ndarray]:
    """Parameters as their files lie on disk, or copies; where one is in pieces, Orbax puts them together.

    Loading Orbax takes longer than reading a small model does.
    """
    found: dict[str, np.ndarray] = {}
    take = array_files.mapped if mapped else array_files.read
    for name, header in headers.items():
        array = take(path / "params" / name, header)
        if array is None:
            return _read_arrays(path, "params", headers)
        found[name] = array
    return found
