"""What libraries say beside the one line that tells what is wrong."""

import gc
import resource
import warnings
from pathlib import Path

import jax
import pytest
from conftest import LLAMA, random_params
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt import checkpoint, device
from jaxgpt.checkpoint import load, save
from jaxgpt.errors import InputError
from jaxgpt.step_folder import Contents


def test_a_save_that_fails_in_many_arrays_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    contents = Contents(LLAMA, random_params(LLAMA), "base", "float32", [], None, None, {})
    save(tmp_path, 1, contents).result()  # imports want files longer than the limit
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match="step 2 was not saved"):
            save(tmp_path, 2, contents).result()
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.records == []
    assert load(tmp_path).step == 1


def test_a_save_that_cannot_begin_leaves_nothing_that_python_warns_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_clean", lambda _: None)
    (tmp_path / ".step-00000001.partial").mkdir()
    contents = Contents(LLAMA, random_params(LLAMA), "base", "float32", [], None, None, {})
    with pytest.raises(InputError, match=r"step 1 was not saved: .*\.partial"):
        save(tmp_path, 1, contents).result()
    gc.collect()


def test_a_home_that_cannot_be_written_only_makes_starts_slower(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(device._CACHE)
    monkeypatch.setenv("HOME", "/proc/nothing")
    kept = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            device.keep_programs()
            jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7))
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
        compilation_cache.reset_cache()
    assert told == []
