"""A trace in a file: what comes back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxgpt.errors import InputError
from oracle.traces import Trace, load, save
from oracle.traces.trace_file import VERSION

RNG = np.random.default_rng(0)


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


TRACE = Trace(
    taps={
        "z.last name": floats(3, 4),
        "a.bf16": floats(2, 5, dtype=ml_dtypes.bfloat16),
        "m.mask": np.array([[True, False]]),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 3), np.float16),
        "transposed": floats(4, 6).T,
        "x#2": np.arange(5),
    },
    inputs={"ids": np.arange(6, dtype=np.int32).reshape(2, 3)},
    environment={"torch": "2.13", "training": "no"},
    left_out={"cache": "a DynamicCache, which is no array"},
)


def test_a_trace_comes_back_bit_for_bit_in_execution_order(tmp_path: Path):
    save(TRACE, tmp_path / "a.trace")
    back = load(tmp_path / "a.trace")
    assert list(back.taps) == list(TRACE.taps)
    for group, stored in ((TRACE.taps, back.taps), (TRACE.inputs, back.inputs)):
        for name, array in group.items():
            assert (stored[name].dtype, stored[name].shape) == (array.dtype, array.shape)
            assert stored[name].tobytes() == array.tobytes()
    assert (back.environment, back.left_out) == (TRACE.environment, TRACE.left_out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]


def test_arrays_are_mapped_and_not_read_and_cost_one_file_descriptor(tmp_path: Path):
    save(Trace({f"tap{i}": np.full(3, i) for i in range(1500)}), tmp_path / "a.trace")
    back = load(tmp_path / "a.trace")
    assert int(back.taps["tap1499"][2]) == 1499
    assert not back.taps["tap7"].flags.writeable
    descriptors = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(name.endswith("a.trace") for name in descriptors) <= 1


def test_a_trace_may_be_read_by_whom_the_umask_allows(tmp_path: Path):
    save(TRACE, tmp_path / "a.trace")
    (tmp_path / "other").touch()
    assert (tmp_path / "a.trace").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(InputError, match=r"no/such/folder/a\.trace cannot be written"):
        save(TRACE, tmp_path / "no/such/folder/a.trace")
    with pytest.raises(InputError, match="bad is complex64, which a trace cannot hold; convert or exclude it"):
        save(Trace({"bad": np.zeros(2, np.complex64)}), tmp_path / "b.trace")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder cannot be written: "):
        save(TRACE, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_names_that_would_not_survive_a_terminal_are_refused():
    for name in ("", "a\nb", "\x1b[2J"):
        with pytest.raises(InputError, match="is no name for a tap"):
            Trace({name: np.ones(2)})


def test_nothing_recorded_is_refused():
    with pytest.raises(InputError, match="nothing was recorded"):
        Trace({})


# -- Hostile files -----------------------------------------------------------------------


def described(**changes: Any) -> dict[str, Any]:
    sound = {"version": VERSION, "taps": ["a"], "inputs": [], "environment": {}, "left_out": {}}
    return {key: value for key, value in {**sound, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (None, "holds tensors but no trace; write one with `python -m oracle record`"),
        ("{", "is damaged: "),
        ("[" * 100_000, "is damaged: "),
        ("[1]", "holds tensors but no trace"),
        (described(version=99), f"has trace version 99, this oracle reads {VERSION}; record it again"),
        (described(version=...), "has trace version unknown"),
        (described(version=True), "has trace version unknown"),
        (described(taps=["a", "b"]), "its list of taps and its tensors disagree about 'taps/b'"),
        (described(taps=[]), "disagree about 'taps/a'"),
        (described(taps=["a", "a"]), "holds a name twice"),
        (described(taps="a"), "is no list of names"),
        (described(inputs=[3]), "is no list of names"),
        (described(environment={"x": 3}), "its environment is not a table of texts"),
        (described(environment={"x": "\x1b[2J"}), "its environment is not a table of texts"),
        (described(left_out=None), "its left_out is not a table of texts"),
    ],
)
def test_a_file_that_is_no_trace_gets_one_line(tmp_path: Path, description: Any, message: str):
    text = description if isinstance(description, str | None) else json.dumps(description)
    path = tmp_path / "x.trace"
    save_file({"taps/a": np.ones(3)}, path, metadata=None if text is None else {"oracle_trace": text})
    with pytest.raises(InputError) as error:
        load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_with_control_characters_in_a_file_is_refused(tmp_path: Path):
    name = "a\x1b[2J"
    metadata = {"oracle_trace": json.dumps(described(taps=[name]))}
    save_file({f"taps/{name}": np.ones(3)}, tmp_path / "x.trace", metadata=metadata)
    with pytest.raises(InputError, match=r"'a\\x1b\[2J' is no name for a tap"):
        load(tmp_path / "x.trace")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path):
    save(TRACE, tmp_path / "a.trace")
    whole = (tmp_path / "a.trace").read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.trace").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.trace"):
            load(tmp_path / "cut.trace")


def test_a_header_that_lies_about_a_shape_is_refused(tmp_path: Path):
    save(Trace({"a": np.ones((2, 3), np.float32)}), tmp_path / "a.trace")
    whole = (tmp_path / "a.trace").read_bytes()
    (tmp_path / "a.trace").write_bytes(whole.replace(b'"shape":[2,3]', b'"shape":[9,9]'))
    with pytest.raises(InputError, match=r"tensor taps/a of shape \[9, 9\] does not fill its bytes"):
        load(tmp_path / "a.trace")


@pytest.mark.parametrize("shape", [[1] * 100 + [0], [0, 2**62, 2**62]])
def test_a_shape_that_no_array_has_is_refused(tmp_path: Path, shape: list[int]):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    metadata = {"oracle_trace": json.dumps(described())}
    header = json.dumps({"taps/a": entry, "__metadata__": metadata}).encode()
    (tmp_path / "x.trace").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"x\.trace: tensor taps/a of shape \[.* does not fill its bytes 0–0; refused"):
        load(tmp_path / "x.trace")


def test_a_text_is_no_trace(tmp_path: Path):
    (tmp_path / "README.md").write_text("# jaxgpt\n\nA language model.\n")
    with pytest.raises(InputError, match=r"^README\.md is no trace; give a file written by `python -m oracle record`$"):
        load(tmp_path / "README.md")


@pytest.mark.parametrize("name", ["nothing", "."])
def test_no_file_is_one_line(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="is no file; give a trace written by"):
        load(tmp_path / name)
