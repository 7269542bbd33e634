"""Wrong weights: every cause that has a name, planted and undone; and others, which must get none."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted_weights import (
    CASES,
    DOWN,
    EMBED,
    HEADS,
    ODD,
    OUT,
    SQUARE,
    UP,
    Fault,
    Q,
    Tensors,
    exchange,
    fine_tuned,
    fresh,
    heads_moved,
    layers,
    on,
    on_all,
    rounded,
)
from safetensors.numpy import load_file, save_file

from oracle import diagnosis, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.repairs.weights import parameters
from oracle.results import UNKNOWN, Cause, Finding
from oracle.rungs.bits import ParameterSite

pytestmark = pytest.mark.slow

SEED = 977
"""Of the weights; no other test has it."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A true candidate beside its folder."""

    folder: Path
    reference: Reference
    candidate: Candidate

    def tensors(self) -> Tensors:
        return {name: np.asarray(array) for name, array in self.candidate.stored.items()}

    def comparison(self, candidate: Candidate, source: bool = True) -> Comparison:
        folder = self.folder if source else None
        return Comparison(candidate, self.reference, self.folder, folder, noise.stored_calibration(), SEED)

    def causes(self, candidate: Candidate, source: bool = True, rung: str = "bits") -> list[Cause]:
        return list(diagnosis.bisect(self.comparison(candidate, source), rungs=(rung,)).causes)

    def planted(self, fault: Fault) -> Candidate:
        changed = fault(self.tensors(), np.random.default_rng(SEED))
        return dataclasses.replace(self.candidate, stored={**self.candidate.stored, **changed})


_models: dict[tuple[str, str], Model] = {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    def make(name: str, dtype: str = "float32") -> Model:
        if (name, dtype) not in _models:
            folder = models.write(models.MODELS[name], tmp_path_factory.mktemp(name), dtype, SEED)
            _models[name, dtype] = Model(folder, Reference.load(folder, dtype), models.candidate(folder, dtype))
        return _models[name, dtype]

    return make


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the model is run. Each of the many changes that a repair tries is run a few times, and compiled slower."""
    with jax.disable_jit(request.param == "eager"):
        yield


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_parameter_is_named_by_undoing_it(case: str, model: Callable[..., Model]):
    name, fault, cause, at, elsewhere = CASES[case]
    true = model(name)
    (found,) = true.causes(true.planted(fault))
    assert found.name == cause
    assert found.proved
    assert f"{found.tap}.{found.before.op}" == at
    assert found.after.ok
    if elsewhere or not case.startswith(("layers", "two", "three")):
        assert list(found.also_at) == elsewhere


def test_whole_layers_are_put_back_by_one_repair(model: Callable[..., Model]):
    true = model("llama-deep")
    (found,) = true.causes(true.planted(layers(sorted(range(12), key=str))))
    moved = {f"layers.{i}" for i in range(2, 12)}
    assert {tap.rsplit(".", 1)[0].removesuffix(".attn").removesuffix(".mlp") for tap in found.also_at} == moved
    assert "0, 1, 10, 11, 2" in found.change


def test_the_layer_order_of_one_kind_of_parameter_alone_is_put_back_alone(model: Callable[..., Model]):
    true = model("gpt2-deep")

    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return {f"layers.{i}.mlp.up.kernel": tensors[f"layers.{11 - i}.mlp.up.kernel"] for i in range(12)}

    (found,) = true.causes(true.planted(fault))
    assert found.name == "layers in reversed order"
    assert list(found.also_at) == [f"layers.{i}.mlp.up" for i in range(1, 12)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_revision_is_one_cause_for_every_tensor(dtype: str, model: Callable[..., Model]):
    true = model("gpt2", dtype)
    (found,) = true.causes(true.planted(fine_tuned))
    assert found.name == "weights of another revision"
    assert found.proved
    modules = {name.rpartition(".")[0] for name in true.candidate.stored}
    assert {found.tap, *found.also_at} == modules
    assert [
        c.name for c in true.causes(true.planted(lambda t, rng: {n: rounded(a) for n, a in fine_tuned(t, rng).items()}))
    ] == ["weights of another revision"], "trained in bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_layer_that_is_near_the_files_is_not_called_a_revision(dtype: str, model: Callable[..., Model]):
    true, size = model("llama", dtype), {"float32": 1e-3, "bfloat16": 3e-2}[dtype]

    def noisy(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        layer = {name: array for name, array in tensors.items() if name.startswith("layers.1.")}
        return {
            name: (array * (1 + rng.uniform(-size, size, array.shape))).astype(array.dtype)
            for name, array in layer.items()
        }

    (found,) = true.causes(true.planted(noisy))
    assert (found.name, found.proved) == ("weights of one layer altered", True)
    assert {tap.split(".")[1] for tap in (found.tap, *found.also_at)} == {"1"}
    assert "of layer 1 alone, which differ by " in found.change
    assert "converted with loss" in found.advice


def test_one_perturbed_tensor_is_no_revision(model: Callable[..., Model]):
    true = model("gpt2")
    (found,) = true.causes(true.planted(lambda t, rng: {UP: fine_tuned({UP: t[UP]}, rng)[UP]}))
    assert found.name == UNKNOWN


def test_bf16_bits_read_as_fp16_are_turned_back_bit_for_bit(model: Callable[..., Model]):
    true = model("llama", "bfloat16")
    wrong = on_all(lambda a: a.view(np.float16))
    (found,) = true.causes(true.planted(wrong))
    assert (found.name, found.proved) == ("bf16 bits read as fp16", True)
    assert len(found.also_at) + 1 == len(true.candidate.stored)
    (cast,) = true.causes(true.planted(on(UP, lambda a: a.view(np.float16).astype(jnp.bfloat16))))
    assert cast.name == "bf16 bits read as fp16", "also where the cast to bfloat16 lost bits"


@pytest.mark.parametrize("leaf", ["kernel", "bias"])
def test_a_tensor_of_another_dtype_than_its_neighbours_is_judged(leaf: str, model: Callable[..., Model]):
    true, at = model("gpt2", "bfloat16"), f"layers.0.attn.q.{leaf}"
    (read,) = true.causes(true.planted(on(at, lambda a: a.view(np.float16))))
    assert (read.name, read.proved) == ("bf16 bits read as fp16", True)

    def damaged(array: np.ndarray) -> np.ndarray:
        narrow = array.astype(np.float16)
        narrow[..., 1] = np.nan
        return narrow

    (found,) = true.causes(true.planted(on(at, damaged)))
    assert (found.name, found.proved) == ("NaN or infinite values", True)


@pytest.mark.usefixtures("how")
def test_a_kernel_that_does_not_fit_is_named_though_the_model_does_not_run(model: Callable[..., Model]):
    true = model("llama")
    wrong = true.comparison(true.planted(on(UP, np.transpose)))
    report = diagnosis.bisect(wrong, rungs=("environment", "bits", "operators"))
    assert [(cause.name, cause.proved) for cause in report.causes] == [("kernel transposed", True)]
    assert report.rungs[0].verdict == "pass"
    assert "the candidate does not run (the forward cannot run: " in report.rungs[0].summary
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


@pytest.mark.parametrize("name", ["gpt2", SQUARE])
def test_biases_that_changed_places_without_their_kernels_are_named_so(name: str, model: Callable[..., Model]):
    true = model(name)
    pairs = [(f"layers.{i}.attn.k.bias", f"layers.{i}.attn.v.bias") for i in range(3)]
    (found,) = true.causes(true.planted(exchange(*pairs)))
    assert (found.name, found.proved, list(found.tied)) == ("only biases of query, key and value swapped", True, [])
    kernels = [(a.replace("bias", "kernel"), b.replace("bias", "kernel")) for a, b in pairs]
    (whole,) = true.causes(true.planted(exchange(*pairs, *kernels)))
    assert "query, key and value swapped" in (whole.name, *whole.tied)


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_an_adapter_is_named_behind_the_rounding_to_bfloat16(scale: float, model: Callable[..., Model]):
    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        changed: Tensors = {}
        for name in (f"layers.{i}.attn.{part}.kernel" for i in range(3) for part in "qv"):
            kernel = tensors[name].astype(np.float32)
            thin = rng.standard_normal((len(kernel), 4)) @ rng.standard_normal((4, kernel.shape[1]))
            merged = kernel + scale * float(np.linalg.norm(kernel) / np.linalg.norm(thin)) * thin
            changed[name] = rounded(merged.astype(np.float32)).astype(tensors[name].dtype)
        return changed

    for true in (model("gpt2", "bfloat16"), model("gpt2")):
        (found,) = true.causes(true.planted(fault))
        assert (found.name, found.proved) == ("a low-rank change, such as a merged adapter", True)


def test_equivalent_names_are_a_tie(model: Callable[..., Model]):
    gpt2, llama = model("gpt2"), model("llama")
    (order,) = gpt2.causes(gpt2.planted(CASES["qkv parts"][1]))
    assert list(order.tied) == ["query, key and value swapped"]
    (head,) = llama.causes(llama.planted(fresh("head.weight", 0.02)))
    assert list(head.tied) == ["tensor left at its random init"]


# -- Present on one side only, tied or not ---------------------------------------------


def test_a_missing_bias_is_named_in_every_layer_at_once(model: Callable[..., Model]):
    true = model(SQUARE)
    config = dataclasses.replace(true.candidate.config, qkv_bias=False)
    stored = {n: a for n, a in true.tensors().items() if not n.endswith(("q.bias", "k.bias", "v.bias"))}
    (by_flag,) = true.causes(dataclasses.replace(true.candidate, config=config, stored=stored))
    assert by_flag.name == "config field qkv_bias differs from the folder's"
    assert by_flag.change == "with qkv_bias True, as the folder says, not False"
    (dropped,) = true.causes(dataclasses.replace(true.candidate, stored=stored))
    assert (dropped.name, dropped.proved) == ("bias dropped", True)
    assert list(dropped.also_at) == [f"{at}.{part}" for at in HEADS for part in "qkv"][1:]


def test_a_missing_kernel_and_an_extra_parameter_are_two_causes(model: Callable[..., Model]):
    true = model("gpt2")
    stored = {name: array for name, array in true.tensors().items() if name != UP} | {"scale.weight": np.ones(3)}
    found = true.causes(dataclasses.replace(true.candidate, stored=stored))
    assert [(cause.name, cause.proved) for cause in found] == [("extra parameter", True), ("parameter missing", True)][
        ::-1
    ]


HEADS_OF_TIED: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "lm_head untied and random": lambda e, rng: 0.02 * rng.standard_normal(e.shape).astype(np.float32),
    "tied head with wrong sign or scale": lambda e, rng: e * np.float32(-0.7),
    "lm_head untied though tied in the file": lambda e, rng: e,
}


@pytest.mark.parametrize("name", HEADS_OF_TIED)
def test_an_untied_head_is_named_by_what_it_is_to_the_embedding(name: str, model: Callable[..., Model]):
    true = model("gpt2")
    config = dataclasses.replace(true.candidate.config, tie_word_embeddings=False)
    head = HEADS_OF_TIED[name](true.tensors()[EMBED], np.random.default_rng(SEED))
    candidate = dataclasses.replace(
        true.candidate, config=config, stored={**true.candidate.stored, "head.weight": head}
    )
    (found,) = true.causes(candidate)
    assert (found.name, found.proved, found.tap) == (name, True, "head")
    assert list(found.tied) == ["config field tie_word_embeddings differs from the folder's"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_head_tied_by_the_flag_is_untied(kept: bool, model: Callable[..., Model]):
    true = model("llama")
    config = dataclasses.replace(true.candidate.config, tie_word_embeddings=True)
    stored = {name: array for name, array in true.tensors().items() if kept or name != "head.weight"}
    (found,) = true.causes(dataclasses.replace(true.candidate, config=config, stored=stored))
    assert (found.name, found.proved, found.tap) == ("lm_head wrongly tied", True, "head")


def test_padding_rows_beyond_the_files_are_cut(model: Callable[..., Model]):
    true = model("gpt2")
    config = dataclasses.replace(true.candidate.config, vocab_size=136)
    embedding = np.concatenate([true.tensors()[EMBED], np.ones((5, 36), np.float32)])
    candidate = dataclasses.replace(true.candidate, config=config, stored={**true.candidate.stored, EMBED: embedding})
    (found,) = true.causes(candidate)
    assert (found.name, found.change) == ("padded vocabulary rows live", "without the rows from 131 on")
    assert found.proved


# -- What has no name ------------------------------------------------------------------


@pytest.mark.parametrize("fault", ODD)
def test_what_no_repair_undoes_has_no_name(fault: str, model: Callable[..., Model]):
    true = model("gpt2")
    found = true.causes(true.planted(ODD[fault]))
    assert {cause.name for cause in found} == {UNKNOWN}
    assert len(found) == 1, "all of it is one unknown cause"


def test_an_unknown_cause_leaves_a_known_one_beside_it_to_be_named(model: Callable[..., Model]):
    true = model("gpt2")

    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return {**ODD["squared"](tensors, rng), DOWN: tensors[DOWN].T}

    assert [cause.name for cause in true.causes(true.planted(fault))] == [UNKNOWN, "kernel transposed"]


def test_a_loss_everywhere_does_not_hide_a_transposed_kernel(model: Callable[..., Model]):
    true = model(SQUARE)

    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return {name: rounded(array.T if name == OUT else array) for name, array in tensors.items()}

    found = true.causes(true.planted(fault))
    assert [cause.name for cause in found] == ["values rounded to bfloat16", "kernel transposed"]


def test_an_order_is_named_where_the_values_were_rounded_as_well(model: Callable[..., Model]):
    true = model("llama")

    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        wrong = {**tensors, **CASES["heads permuted"][1](tensors, rng), **CASES["gate and up"][1](tensors, rng)}
        return {name: rounded(array) for name, array in wrong.items()}

    found = true.causes(true.planted(fault))
    assert [c.name for c in found] == ["values rounded to bfloat16", "heads permuted", "gate and up swapped"]
    assert all(cause.proved for cause in found)


def test_two_orders_at_once_are_no_random_init(model: Callable[..., Model]):
    true, k = model(SQUARE), "layers.0.attn.k.kernel"

    def fault(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return {Q: tensors["layers.0.attn.out.kernel"].T, k: rng.permutation(tensors["layers.0.attn.v.kernel"])}

    assert {c.name for c in true.causes(true.planted(fault))} == {UNKNOWN}


@pytest.mark.parametrize("name", ["gpt2", "llama", SQUARE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_repair_undoes_a_right_parameter(name: str, dtype: str, model: Callable[..., Model]):
    true = model(name, dtype)
    comparison, file = true.comparison(true.candidate), true.tensors()
    for parameter in true.candidate.stored:
        module, _, leaf = parameter.rpartition(".")
        site = ParameterSite(comparison, "bits", Finding(module, leaf, ok=True, where="reference"), file)
        undone = [repair.cause for repair in parameters.REPAIRS if list(repair.variants(site))]
        assert undone == [], parameter


def test_weight_and_bias_of_one_norm_exchanged_are_no_exchange_of_norms(model: Callable[..., Model]):
    true = model("gpt2-deep")
    (found,) = true.causes(true.planted(exchange(("layers.1.attn_norm.weight", "layers.1.attn_norm.bias"))))
    assert (found.name, found.proved) == ("parameters of equal shape swapped", True)


def test_one_added_to_a_bias_is_not_gemmas_norm(model: Callable[..., Model]):
    true = model("gpt2")
    at = {leaf: f"layers.0.mlp_norm.{leaf}" for leaf in ("weight", "bias")}
    wrong = {leaf: true.planted(on(name, lambda array: array + np.float32(1))) for leaf, name in at.items()}
    names = {leaf: true.causes(candidate)[0].name for leaf, candidate in wrong.items()}
    assert names["weight"] == "(1+w) norm handling"
    assert names["bias"] != "(1+w) norm handling"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_reference_that_was_rounded_is_no_other_revision(dtype: str, model: Callable[..., Model], tmp_path: Path):
    true = model("llama")
    tensors = load_file(true.folder / "model.safetensors")
    coarse = {name: np.asarray(array.astype(jnp.dtype(dtype)), np.float32) for name, array in tensors.items()}
    shutil.copytree(true.folder, tmp_path / "hf")
    save_file(coarse, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    rounded_one = Model(tmp_path / "hf", Reference.load(tmp_path / "hf", "float32"), true.candidate)
    (found,) = rounded_one.causes(true.candidate)
    assert (found.name, found.proved) == (f"the reference is rounded to {dtype}", True)


def test_a_fault_of_one_layer_is_not_blamed_on_the_table_of_all(model: Callable[..., Model]):
    true = model("gpt2-deep")
    in_all = [name for name in true.tensors() if name.endswith("mlp.up.kernel")]
    one, all_ = (
        true.causes(true.planted(lambda t, rng, names=names: {n: -t[n] for n in names}))[0].advice
        for names in ([UP], in_all)
    )
    assert one.endswith("of 12 layers only this one has it, so look at its own tensor before a rule for all layers")
    assert "only this one" not in all_


@pytest.mark.usefixtures("how")
def test_a_field_that_is_seen_to_differ_is_not_tied_with_its_effect(model: Callable[..., Model]):
    true = model("llama")
    config = dataclasses.replace(true.candidate.config, rope_theta=20000.0)
    (found,) = true.causes(dataclasses.replace(true.candidate, config=config), rung="operators")
    assert found.name == "config field rope_theta differs from the folder's"
    assert (found.proved, list(found.tied)) == (True, [])


# -- Exports, and rungs above ----------------------------------------------------------


def test_without_a_source_the_advice_is_about_the_export(model: Callable[..., Model]):
    true = model("llama")
    wrong = true.planted(on(UP, np.transpose))
    (imported,), (exported,) = true.causes(wrong), true.causes(wrong, source=False)
    assert imported.name == exported.name == "kernel transposed"
    assert exported.advice.startswith("checkpoint and export differ, so look at to_hf in jaxgpt/weights.py")
    assert imported.advice.startswith("which way its file stores it")


def test_a_wrong_export_of_a_right_candidate_changes_no_candidate(model: Callable[..., Model], tmp_path: Path):
    true, other = model("gpt2"), models.write(models.MODELS["gpt2"], tmp_path, "float32", SEED + 1)
    comparison = dataclasses.replace(true.comparison(true.candidate), export=other)
    report = diagnosis.bisect(comparison, rungs=("bits",))
    assert report.causes[0].before.where == "export"
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


@pytest.mark.usefixtures("how")
def test_wrong_weights_are_named_by_what_they_compute(model: Callable[..., Model]):
    true = model(SQUARE)
    leaves = (Q, "layers.0.attn.q.bias")
    wrong = true.planted(lambda t, rng: {name: heads_moved(t[name], [1, 0, 2, 3, 5, 4], -1) for name in leaves})
    (found,) = true.causes(wrong, rung="operators")
    assert (found.name, found.tap, found.proved) == ("heads permuted", "layers.0.attn.q", True)


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize(
    ("field", "value", "tap"),
    [
        ("rope_theta", 500.0, "rope.angles"),
        ("rms_norm_eps", 1e-3, "layers.0.attn_norm"),
        ("rope_scaling", None, "rope.angles"),
    ],
)
def test_a_config_field_that_differs_from_the_folders_is_named(
    field: str, value: Any, tap: str, model: Callable[..., Model]
):
    true = model(SQUARE)
    config = dataclasses.replace(true.candidate.config, **{field: value})
    (found,) = true.causes(dataclasses.replace(true.candidate, config=config), rung="operators")
    assert (found.name, found.tap, found.proved) == (f"config field {field} differs from the folder's", tap, True)
    assert field in found.advice
    assert json.loads((true.folder / "config.json").read_text())["model_type"] == "llama"
