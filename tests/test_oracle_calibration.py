"""Clean runs, the limits that come from them, and what happens where they do not hold."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import torchref
from jaxgpt import taps
from jaxgpt.errors import InputError
from jaxgpt.ops import FUNCTIONS
from oracle import calibrate, clean, ladder, limits, models, noise, subject, weight_kinds, workers
from oracle.__main__ import main
from oracle.candidate import Candidate
from oracle.clean import Run
from oracle.comparison import Comparison
from oracle.echo import echo, leave_a_doubt
from oracle.noise import Calibration, ratios
from oracle.probe import sequences
from oracle.reference import Reference
from oracle.results import Finding, Report, RungResult
from oracle.rungs import environment, forward, operators

pytestmark = pytest.mark.slow

SMALL = {
    "gpt2": models.MODELS["gpt2"] | {"n_layer": 1, "n_positions": 20},
    "llama": models.MODELS["llama"] | {"num_hidden_layers": 1, "max_position_embeddings": 20},
}
SEED = 60_000
STORED = json.loads(noise.CALIBRATION.read_text())


# -- Models ----------------------------------------------------------------------------


def test_a_trained_model_has_learnt_its_language():
    config = models.MODELS["llama"] | {"num_hidden_layers": 1}
    trained, untrained = torchref.build(config), torchref.build(config)
    trained.load_state_dict(weight_kinds.draw(config, 1, "trained"))
    ids = weight_kinds.language(131, 8, 30, torch.Generator().manual_seed(2))
    with torch.no_grad():
        losses = [
            cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item() for m in (trained, untrained)
        ]
    assert losses[0] < losses[1] - 0.3


def test_kinds_of_weights_have_the_scales_they_are_named_for():
    drawn = {kind: weight_kinds.draw(models.MODELS["gpt2"], 3, kind) for kind in ("random", "loud", "quiet", "outlier")}
    name = "transformer.h.0.mlp.c_proj.weight"
    assert torch.equal(drawn["loud"][name], 3 * drawn["random"][name])
    assert torch.equal(drawn["quiet"][name], 0.1 * drawn["random"][name])
    for tensor in (drawn["outlier"][name], drawn["outlier"]["transformer.wte.weight"]):
        sizes = tensor.abs().mean(0).sort().values
        assert sizes[-2] > 20 * sizes[-3], "two channels of the stream stand out"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_outliers_are_the_same_channels_wherever_the_stream_is_written(family: str):
    tensors = weight_kinds.draw(models.MODELS[family], 4, "outlier")
    channels: set[frozenset[int]] = set()
    for name, tensor in tensors.items():
        is_embedding = any(part in name for part in weight_kinds.EMBEDDINGS)
        if tensor.ndim == 2 and (is_embedding or weight_kinds.writes(name)):
            # torch's Linear is (out, in), GPT-2's Conv1D (in, out).
            outputs = tensor if is_embedding or family == "gpt2" else tensor.T
            channels.add(frozenset(outputs.abs().mean(0).topk(2).indices.tolist()))
    assert len(channels) == 1


def test_weights_are_the_same_at_every_call_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = (weight_kinds.draw(SMALL["gpt2"], 6, "trained") for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_models_cover_the_shapes_on_which_ports_differ():
    configs = [clean.models.from_hf(config) for config in models.MODELS.values()]
    heads = [(c.num_attention_heads, c.num_key_value_heads) for c in configs if c.position_embedding == "rope"]
    assert any(k == 1 for _, k in heads)
    assert any(n == k for n, k in heads)
    assert any(1 < k < n for n, k in heads)
    assert any(c.max_position_embeddings > 512 and c.rope_scaling for c in configs)
    assert any(c.max_position_embeddings > 512 and c.position_embedding == "learned" for c in configs)
    assert any(c.num_hidden_layers >= 12 for c in configs)
    assert any(c.head_dim != c.hidden_size // c.num_attention_heads for c in configs)


# -- Plans -----------------------------------------------------------------------------


def test_the_full_plan_is_at_least_300_runs_of_every_model_dtype_and_kind():
    plan = clean.full_plan()
    assert len(plan) >= 300
    assert len({run.name for run in plan}) == len(plan)
    assert {run.model for run in plan} == set(clean.CONFIGS)
    tiny = {(run.model, run.dtype, run.kind) for run in plan if run.model in models.MODELS}
    assert len(tiny) >= 2 * (len(models.MODELS) - 2) * len(weight_kinds.KINDS)
    assert any(not run.jit for run in plan)


def test_a_quick_plan_has_every_op_that_any_model_has():
    quick = {op.function for name in clean.QUICK for op in every_op(name)}
    assert quick == {op.function for name in clean.CONFIGS for op in every_op(name)}


def every_op(name: str) -> Iterator[taps.Op]:
    config = clean.models.from_hf(clean.CONFIGS[name])
    yield from (*taps.ops(config), *taps.ops(config, taps.Wiring(cached=True)))


def test_a_group_holds_all_runs_of_a_model_so_that_no_other_process_compiles_it():
    groups = clean.groups(clean.full_plan())
    assert sorted(group[0].model for group in groups) == sorted(clean.CONFIGS)
    assert all({run.model for run in group} == {group[0].model} for group in groups)


class _Listening(Calibration):
    """Limits that nothing exceeds, and which rungs asked for them."""

    def __init__(self) -> None:
        super().__init__(1.0, {}, {})
        object.__setattr__(self, "asked", set())

    def threshold(self, rung: str, dtype: str, op: str) -> tuple[float, float]:
        self.asked.add(rung)  # pyright: ignore[reportAttributeAccessIssue]
        return float("inf"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(SMALL["gpt2"], tmp_path_factory.mktemp("small"), "float32", SEED)


@pytest.mark.exhaustive
def test_the_rungs_that_are_calibrated_are_those_that_ask_for_limits(folder: Path):
    listening = _Listening()
    candidate, reference = models.candidate(folder, "float32"), Reference.load(folder, "float32")
    report = ladder.climb(Comparison(candidate, reference, folder, folder, listening, SEED), everything=True)
    assert [rung.name for rung in report.rungs] == [*ladder.LADDER][:-1], "it has no golden prompts"
    assert listening.asked == set(clean.RUNGS)  # pyright: ignore[reportAttributeAccessIssue]


# -- From runs to limits ---------------------------------------------------------------


def records(ratios_of_runs: list[tuple[float, float, float]], op: str = "norm") -> list[clean.Record]:
    return [
        {"run": f"m random float32 seed={seed}", "dtype": "float32", "ratios": {"forward": {op: list(r)}}}
        for seed, r in enumerate(ratios_of_runs)
    ]


def test_a_calibration_file_holds_the_largest_ratios_and_what_they_are_worth():
    document = limits.document(records([(1.0, 2.0, 1e-7), (3.0, 1.0, 2e-7), (2.0, 1.5, 4e-7)]), factor=4.0)
    assert document["maxima"] == {"forward": {"float32": {"norm": [3.0, 2.0]}}}
    assert document["trips"]["forward"]["float32"]["norm"] == pytest.approx([12 * 2e-7, 12 * 4e-7])
    assert len(document["runs"]) == 3
    text = "\n".join(limits.lines(document))
    assert "3 clean runs; a limit is 4 times the largest ratio" in text
    assert "forward float32 norm" in text


def test_headroom_is_what_one_half_leaves_the_other():
    even = [(1.0, 1.0, 0.0)] * 10
    assert limits.headroom(even, 4.0) == 4.0
    assert limits.headroom([*even, (1.0, 8.0, 0.0)], 4.0) == 0.5, "a clean run would have alarmed"
    assert limits.headroom([(0.0, 0.0, 0.0)] * 4, 4.0) == float("inf"), "always exact"
    assert limits.headroom([(0.0, 0.0, 0.0), (0.0, 0.1, 0.0)], 4.0) == 0.0, "exact, but not always"


def test_growth_is_the_share_of_the_final_maximum_that_few_runs_reached():
    runs = [(1.0, 1.0, 0.0)] * 10 + [(2.0, 1.0, 0.0)] * 90 + [(4.0, 1.0, 0.0)]
    assert limits.growth(runs) == [0.25, 0.5]


def test_a_run_that_is_not_clean_without_limits_stops_the_calibration(monkeypatch: pytest.MonkeyPatch):
    broken = Report(
        [RungResult("forward", [Finding("mask", "attention_mask", ok=False, problem="3 differ")], "")], [], {}
    )
    monkeypatch.setattr(clean, "carry_out", lambda run, rungs: broken)
    with pytest.raises(clean.NotClean, match=r"gpt2 random float32 seed=0: forward mask 3 differ"):
        clean.measured(Run("gpt2", "random", "float32", 0))


# -- Carrying out ----------------------------------------------------------------------


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A quick plan of four runs that take no time; the names of those that were carried out."""
    done: list[str] = []

    def measured(run: Run) -> clean.Record:
        done.append(run.name)
        return records([(1.0, 2.0, 1e-7)])[0] | {"run": run.name, "seconds": 0.1, "largest": "2.00 forward norm"}

    monkeypatch.setattr(clean, "quick_plan", lambda: [Run("gpt2", "random", "float32", seed) for seed in range(4)])
    monkeypatch.setattr(clean, "measured", measured)
    monkeypatch.setattr(workers, "affordable", lambda tasks: 1)
    return done


def test_an_interrupted_calibration_goes_on_where_it_stopped(tiny_plan: list[str], tmp_path: Path):
    out = tmp_path / "c.json"
    lines = calibrate.calibrate(out, quick=True)
    for _ in range(3):
        next(lines)  # the head and two runs; then the power fails, in the middle of a line
    lines.close()
    with (tmp_path / "c.runs.jsonl").open("a") as file:
        file.write('{"run": "gpt2 ran')
    assert not out.exists()
    said = list(calibrate.calibrate(out, quick=True))
    assert said[0] == "4 clean runs, 2 of them in c.runs.jsonl"
    assert len(tiny_plan) == len(set(tiny_plan)) == 4
    stored = json.loads(out.read_text())
    assert len(stored["runs"]) == 4
    assert stored["factor"] == calibrate.QUICK_FACTOR > calibrate.FACTOR
    assert noise.load(out).threshold("forward", "float32", "norm") == (8.0, 16.0)


@pytest.mark.parametrize("changed", ["fingerprint", "setting"])
def test_runs_of_other_code_or_another_machine_are_not_taken_over(
    changed: str, tiny_plan: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    list(calibrate.calibrate(tmp_path / "c.json", quick=True))
    value = getattr(calibrate, changed)()
    monkeypatch.setattr(calibrate, changed, lambda: {**value, "cpu": "Z80"} if changed == "setting" else "other")
    assert next(iter(calibrate.calibrate(tmp_path / "c.json", quick=True))).startswith("4 clean runs, 0 of them")
    assert len(tiny_plan) == 4


def test_a_calibration_says_where_it_was_made():
    assert {
        "python",
        "jax",
        "jaxlib",
        "torch",
        "numpy",
        "backend",
        "device",
        "machine",
        "cpu",
    } <= calibrate.setting().keys()


def test_the_oracles_own_limits_never_come_from_a_quick_plan(capsys: pytest.CaptureFixture[str]):
    assert main(["calibrate", "--quick"]) == 2
    assert capsys.readouterr().err.startswith("oracle: --quick needs --out FILE")


@pytest.mark.exhaustive
def test_two_processes_do_every_task_and_a_failure_is_raised_here():
    # A function of a small module: each process imports the one it is sent.
    assert sorted(workers.answers([[1, 4], [9]], math.isqrt, processes=2)) == [1, 2, 3]
    with pytest.raises(workers.WorkerFailed, match=r"ValueError: .*nonnegative"):
        list(workers.answers([[1], [-1]], math.isqrt, processes=2))


ORPHANED = """
import os, sys, time
from oracle import workers

def sleep(path):
    open(path, "w").write(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    list(workers.answers([sys.argv[1:2], sys.argv[2:]], sleep, processes=2))
"""


@pytest.mark.exhaustive
def test_the_processes_end_with_the_one_that_was_killed(tmp_path: Path):
    script, files = tmp_path / "orphaned.py", [tmp_path / name for name in ("one", "two")]
    script.write_text(ORPHANED)
    parent = subprocess.Popen([sys.executable, script, *files], cwd=Path(workers.__file__).parent.parent)
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_alive(int(file.read_text())) for file in files))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# -- Where the limits do not hold ------------------------------------------------------

HERE = {"backend": "cpu", "jax": "0.10.2", "torch": "2.13.0+cpu", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backend": "gpu"}, "with backend cpu, this is backend gpu"),
        ({"jax": "0.11.2"}, "with jax 0.10.2, this is jax 0.11.2"),
        ({"jax": "1.10.2"}, "with jax 0.10.2, this is jax 1.10.2"),
        ({"torch": "2.14.0"}, "with torch 2.13.0+cpu, this is torch 2.14.0"),
    ],
)
def test_limits_of_another_backend_or_minor_version_are_stale(change: dict[str, str], said: str):
    stale = noise.staleness(HERE, HERE | change)
    assert said in stale
    assert "`python -m oracle calibrate --quick --out FILE`" in stale


@pytest.mark.parametrize("change", [{}, {"jax": "0.10.9"}, {"torch": "2.13.1+cu130"}, {"numpy": "3.0"}])
def test_a_patch_version_is_no_other_environment(change: dict[str, str]):
    assert noise.staleness(HERE, HERE | change) == ""


def test_stale_limits_are_inconclusive_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch):
    candidate, reference = models.candidate(folder, "float32"), Reference.load(folder, "float32")
    elsewhere = Calibration(4.0, STORED["maxima"], {**environment.versions(), "backend": "tpu"})

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(Candidate, "forward", forbidden)
    report = ladder.climb(Comparison(candidate, reference, folder, folder, elsewhere, SEED), everything=True)
    assert report.verdict == "inconclusive"
    assert [rung.name for rung in report.rungs] == [environment.NAME]
    assert "calibrated with backend tpu, this is backend cpu" in report.rungs[0].inconclusive
    assert report.environment["calibrated_with"]["backend"] == "tpu"


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoint"
    subject.import_folder(folder, directory)
    return directory


def test_a_stale_file_is_exit_code_3_and_names_the_remedy(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(STORED | {"environment": STORED["environment"] | {"jax": "0.9.1"}}))
    assert main(["compare", str(checkpoint), "--calibration", str(file)]) == 3
    printed = capsys.readouterr().out
    assert printed.startswith("INCONCLUSIVE. The noise was calibrated with jax 0.9.1, this is jax ")
    assert "pass --calibration FILE" in printed


def test_the_limits_of_a_named_file_are_used(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "tight.json"
    exact = {
        rung: {dtype: {op: [0.0, 0.0] for op in ops} for dtype, ops in dtypes.items()}
        for rung, dtypes in STORED["maxima"].items()
    }
    file.write_text(json.dumps(STORED | {"maxima": exact, "environment": environment.versions()}))
    assert main(["compare", str(checkpoint), "--calibration", str(file)]) == 1
    assert capsys.readouterr().out.startswith("FAIL. First divergence: embed.sum, op add")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the calibration"),
        ("{", "is not a calibration; `python -m oracle calibrate --out FILE` makes one"),
        ('{"factor": 4}', "is not a calibration"),
        ("[]", "is not a calibration"),
        (
            '{"version": 2, "factor": 4, "maxima": {}, "environment": {"jax": "0.10.2"}}',
            "does not say its backend, torch",
        ),
    ],
)
def test_a_file_that_is_no_calibration_is_one_line(
    content: str | None, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    assert main(["compare", str(checkpoint), "--calibration", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed
    with pytest.raises(InputError):
        noise.load(file)


# -- The measure -----------------------------------------------------------------------


def test_an_echo_moves_every_rounded_tap_by_about_an_ulp_and_is_the_same_every_time(folder: Path):
    reference = Reference.load(folder, "float32")
    probe = sequences(models.candidate(folder, "float32").config, 131, SEED)
    plain, one, again, two = (
        {tap: value.clone() for tap, value in reference.peer.stream(probe, *how)}
        for how in ((), (echo(1),), (echo(1),), (echo(2),))
    )
    assert torch.equal(plain["embed.tokens"], one["embed.tokens"]), "a lookup does not round"
    assert all(torch.equal(one[tap], again[tap]) for tap in one)
    assert not torch.equal(one["logits"], two["logits"])
    moved = (one["layers.0.attn_norm"] - plain["layers.0.attn_norm"]).norm() / plain["layers.0.attn_norm"].norm()
    assert 0.1 * 2.0**-23 < moved < 4 * 2.0**-23
    assert torch.isfinite(one["logits"]).all()


@pytest.mark.parametrize(
    ("ok", "ratio", "limit", "doubt"),
    [
        (True, 5.0, 8.0, False),
        (False, 9.0, 8.0, True),
        (False, 400.0, 8.0, False),
        (True, 5.0, float("inf"), True),
        (True, 1.5, float("inf"), False),
    ],
)
def test_noise_is_drawn_again_where_it_may_decide(ok: bool, ratio: float, limit: float, doubt: bool):
    """Beyond the limits but not hopelessly; and wherever limits are still to be found."""
    found = Finding("logits", "head", ok, aggregate=ratio, worst=0.0, threshold=(limit, limit))
    assert leave_a_doubt([found]) == doubt


def test_the_unit_is_the_largest_error_of_peer_and_echoes_and_of_earlier_steps():
    truth = np.ones((4, 8))
    candidate, lucky, fair = truth + 1e-3, truth + 1e-6, truth + 1e-3
    assert ratios([(candidate, truth, lucky)], 1e-9).aggregate == pytest.approx(1000)
    assert ratios([(candidate, truth, lucky, fair)], 1e-9).aggregate == pytest.approx(1)
    assert ratios([(candidate, truth, lucky, fair)], 1e-9).worst == pytest.approx(1)
    unit = noise.Unit()
    ratios([(candidate, truth, fair)], 1e-9, unit=unit)
    assert ratios([(candidate, truth, lucky)], 1e-9, unit=unit).worst == pytest.approx(1)


def test_an_echo_that_is_not_finite_is_a_problem():
    truth = np.ones((2, 3))
    assert ratios([(truth, truth, truth, truth * np.nan)], 1e-9).problem.startswith("the reference has NaN")


# -- Every limit can be tripped --------------------------------------------------------

REACH = {"float32": 1e-5, "bfloat16": 0.02}
"""Relative error in one op that must be seen."""


@pytest.mark.parametrize("dtype", list(REACH))
def test_a_limit_that_no_fault_could_trip_is_not_stored(dtype: str):
    """From the clean runs alone: the largest relative error of any run that the aggregate limit forgives."""
    blind = {op: any_run for op, (_, any_run) in STORED["trips"]["operators"][dtype].items() if any_run > REACH[dtype]}
    assert blind == {}


def scaled(function: str, share: float) -> Callable[..., Any]:
    def op(config: Any, p: Any, *inputs: Any) -> Any:
        right = FUNCTIONS[function](config, p, *inputs)
        return (right.astype(jnp.float32) * (1 + share)).astype(right.dtype)

    return op


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", "float32"),
        ("llama", "bfloat16"),
        pytest.param("llama", "float32", marks=pytest.mark.exhaustive),
        pytest.param("gpt2", "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_a_small_error_in_any_op_is_seen(family: str, dtype: str, tmp_path: Path):
    folder = models.write(SMALL[family], tmp_path, dtype, SEED)
    true, reference = models.candidate(folder, dtype), Reference.load(folder, dtype)
    probe = sequences(true.config, 131, SEED)
    functions = {op.function for op in taps.ops(true.config, taps.Wiring(cached=True))} - {"attention_mask"}
    replaced = {function: scaled(function, REACH[dtype]) for function in functions}
    judge = Comparison(true, reference, None, None, noise.stored_calibration(), SEED).judge(operators.NAME)
    with jax.default_matmul_precision("highest"):
        right = operators.run(true, reference, probe, judge)
        wrong = operators.run(dataclasses.replace(true, replace=replaced), reference, probe, judge)
    assert right.verdict == "pass"
    unseen = [f.tap for f in wrong.findings if f.ok and f.op != "attention_mask"]
    assert unseen == []


def test_the_stored_limits_leave_room_for_runs_that_were_not_seen():
    if STORED["plan"] != "full":
        pytest.skip("the stored limits come from a few runs; `python -m oracle calibrate` measures all")
    rooms = [room for _, room in limits.flat(STORED["headroom"]) if room is not None]
    assert min(rooms) >= 2.0, "clean runs come too near to limits that others of them gave"


def test_forward_is_limited_for_every_op_that_operators_is():
    for dtype in REACH:
        local, free = (STORED["maxima"][rung][dtype].keys() for rung in (operators.NAME, forward.NAME))
        assert local - {"store"} <= free
