"""`jaxgpt check`: is what was trained what answers? One line per check, the cause with a failure."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jaxgpt import checkpoint
from jaxgpt.checks.golden import golden_prompts_test
from jaxgpt.checks.greedy import cache_dtype_test, greedy_is_greedy_test
from jaxgpt.checks.parity import forward_parity_test, kv_cache_parity_steps_test
from jaxgpt.checks.report import CheckLine, CheckReport, token
from jaxgpt.checks.tokens import special_token_id_stability_test, stop_token_test, tokenizer_self_test
from jaxgpt.checks.training import MEMORIZE_UNDER, loss_mask_test, single_batch_memorize_test
from jaxgpt.device import use
from jaxgpt.errors import InputError
from jaxgpt.flops import parameter_count
from jaxgpt.lm import LM

__all__ = ["CheckLine", "CheckReport", "check", "check_model", "facts"]

Report = Callable[[CheckLine], None]


def check(
    directory: str, *, all: bool = False, memorize: bool | None = None, device: str = "auto", report: Report = print
) -> CheckReport:
    """Check a checkpoint; every line goes to `report` as soon as it is known.

    Args:
        directory: a run folder (its newest step is taken) or one step folder.
        all: go on after a failure.
        memorize: overfit a small batch too; None: if the model has under 50 M parameters.
        device: "auto", "cpu" or "gpu".
        report: what to do with each line.

    Raises:
        InputError: no checkpoint there, or one that does not load.
    """
    use(device)
    loaded = checkpoint.load(directory)
    lm = LM(loaded)
    known = facts(lm, stored_dtypes=sorted({str(array.dtype) for array in loaded.params.values()}))
    for line in known:
        report(line)
    found = check_model(
        lm, eos_token_ids=loaded.eos_token_ids, golden=loaded.path, all=all, memorize=memorize, report=report
    )
    return CheckReport((*known, *found.lines))


def facts(lm: LM, stored_dtypes: Sequence[str]) -> tuple[CheckLine, ...]:
    """What is being checked."""
    tokenizer = lm.tokenizer
    stops = ", ".join(token(tokenizer, id) for id in lm.stop_ids) or "none"
    known = {
        "model dtype": ", ".join(stored_dtypes),
        "compute dtype": lm.compute_dtype,
        "tokenizer": tokenizer.kind if tokenizer else "none",
        "vocab_size": f"{lm.real_ids:,} (the model embeds {lm.config.vocab_size:,})",
        "base_vocab_size": f"{tokenizer.base_vocab_size:,}" if tokenizer else "unknown",
        "stop tokens": stops,
    }
    return tuple(CheckLine(name, "INFO", detail) for name, detail in known.items())


def check_model(
    lm: LM,
    *,
    eos_token_ids: Sequence[int] = (),
    golden: Path | None = None,
    all: bool = False,
    memorize: bool | None = None,
    report: Report = print,
) -> CheckReport:
    """Check a loaded model; see `check`.

    Args:
        lm: the model.
        eos_token_ids: the stop ids it has besides its tokenizer's.
        golden: the folder with its golden prompts.
        all, memorize, report: as in `check`.
    """
    lines: list[CheckLine] = []
    for test in _tests(lm, eos_token_ids, golden, memorize):
        line = _line(lm, test)
        lines.append(line)
        report(line)
        if line.status == "FAIL" and not all:
            break
    return CheckReport(tuple(lines))


Test = Callable[[LM], CheckLine]


def _tests(lm: LM, eos_token_ids: Sequence[int], golden: Path | None, memorize: bool | None) -> tuple[Test, ...]:
    """In this order: each relies on what those before it found sound."""
    return (
        tokenizer_self_test,
        special_token_id_stability_test,
        forward_parity_test,
        kv_cache_parity_steps_test,
        greedy_is_greedy_test,
        loss_mask_test,
        cache_dtype_test,
        partial(stop_token_test, eos_token_ids=eos_token_ids),
        partial(golden_prompts_test, folder=golden),
        partial(_memorize, wanted=memorize),
    )


def _memorize(lm: LM, wanted: bool | None) -> CheckLine:
    name, parameters = "single_batch_memorize_test", parameter_count(lm.config)
    if wanted is False:
        return CheckLine(name, "SKIP", "not asked for")
    if wanted is None and parameters >= MEMORIZE_UNDER:
        return CheckLine(name, "SKIP", f"{parameters:,} parameters; pass --memorize to overfit so large a model")
    return single_batch_memorize_test(lm)


def _line(lm: LM, test: Test) -> CheckLine:
    """The test's line; what a test refuses to work with is a failure of that test."""
    try:
        return test(lm)
    except InputError as error:
        function = test.func if isinstance(test, partial) else test
        name = function.__name__ if function is not _memorize else "single_batch_memorize_test"
        return CheckLine(name, "FAIL", str(error))
