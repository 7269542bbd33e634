"""Training runs without what only some tests are about; as a program, the jaxgpt command with such runs."""

import sys

import pytest

from jaxgpt import cli, golden_prompts, preflight, run_log


def bare(patch: pytest.MonkeyPatch) -> None:
    """No estimate of memory, golden prompts or picture, which take most of a tiny run's time.

    They are looked at in test_preflight.py, test_gates.py and test_train.py.
    """
    patch.setattr(preflight, "step_bytes", lambda *_: 1)
    patch.setattr(golden_prompts, "add", lambda _: None)
    patch.setattr(run_log, "picture", lambda _: None)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        bare(patch)
        sys.exit(cli.main(sys.argv[1:]))
