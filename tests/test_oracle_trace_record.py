"""Recording: what of a run becomes a tap, under which name, in which order; in torch, Flax and plain functions."""

import dataclasses
import json
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from jaxgpt.errors import InputError
from oracle import models, subject, traces
from oracle.__main__ import main
from oracle.traces.recorder import record_any

pytestmark = pytest.mark.slow

# -- Plain functions ---------------------------------------------------------------------

Heads = namedtuple("Heads", "query key")


@dataclasses.dataclass
class Output:
    logits: Any
    cache: Any = None


def test_nested_values_become_dotted_names_in_order():
    taps = {
        "z": np.ones(1),
        "a": [jnp.ones(2), (torch.ones(3), {"deep": 4.0})],
        "out": Output(np.ones(4)),
        "heads": Heads(np.ones(5), None),
        "more": OrderedDict(b=np.ones(6), a=np.ones(7)),
    }
    trace = traces.record(lambda: taps)
    assert [(name, tap.shape) for name, tap in trace.taps.items()] == [
        ("z", (1,)),
        ("a.0", (2,)),
        ("a.1.0", (3,)),
        ("a.1.1.deep", ()),
        ("out.logits", (4,)),
        ("heads.query", (5,)),
        ("more.b", (6,)),
        ("more.a", (7,)),
    ]


def test_what_is_no_array_is_named_and_not_silently_dropped():
    trace = traces.record(lambda: {"x": np.ones(1), "text": "hello", "key": jax.random.key(0), "object": object()})
    assert trace.left_out == {
        "text": "a str, which is no array",
        "key": "a PRNGKeyArray, which is no array",
        "object": "a object, which is no array",
    }


def test_a_recorded_array_does_not_change_with_the_program_s():
    array, tensor = np.zeros(3), torch.zeros(3)
    trace = traces.record(lambda: {"array": array, "tensor": tensor})
    array += 1
    tensor += 1
    assert not trace.taps["array"].any()
    assert not trace.taps["tensor"].any()


def test_dtypes_that_numpy_lacks_and_complex_numbers_survive(tmp_path: Path):
    values = [1.5, -2.0]
    trace = traces.record(
        lambda: {
            "jax": jnp.array(values, jnp.bfloat16),
            "torch": torch.tensor(values, dtype=torch.bfloat16),
            "eight": torch.tensor(values, dtype=torch.float8_e4m3fn),
            "angles": torch.tensor([1 + 2j]).conj(),
        }
    )
    traces.save(trace, tmp_path / "a.trace")
    taps = traces.load(tmp_path / "a.trace").taps
    assert [taps[name].dtype for name in ("jax", "torch", "eight")] == [
        ml_dtypes.bfloat16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
    ]
    assert all(taps[name].astype(float).tolist() == values for name in ("jax", "torch", "eight"))
    assert (taps["angles.real"].tolist(), taps["angles.imag"].tolist()) == ([1.0], [-2.0])


def test_include_and_exclude_choose_by_expression():
    trace = traces.record(lambda: dict.fromkeys(("a.q", "a.k", "b.q"), np.ones(1)), include="q$", exclude="^b")
    assert list(trace.taps) == ["a.q"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traces.record(lambda: [1]), "returned list, not a dict of arrays by tap name"),
        (lambda: traces.record(lambda: {"a": "text"}), "nothing was recorded"),
        (lambda: traces.record(lambda: {"a": 1}, include="("), "include: '(' is no regular expression"),
        (lambda: traces.record(lambda: {"a": torch.eye(2).to_sparse()}), "a is a sparse or quantized tensor"),
        (lambda: jax.jit(lambda x: traces.record(lambda: {"a": x}))(1.0), "a has no value, JAX is only tracing it"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(call: Any, message: str):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- torch -------------------------------------------------------------------------------


class Branch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor, scale: float = 1.0):
        y = self.relu(self.inner(x))
        return y * scale, {"sum": y.sum(), "nothing": None}


class Tree(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)
        self.b, self.a = Branch(), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor):
        for _ in range(2):
            x = self.a(x)
        return self.b(x, scale=3.0)[0]

    def twice(self, x: torch.Tensor):
        return self(x) * 2


def test_torch_modules_are_taps_in_the_order_they_finish():
    torch.manual_seed(0)
    tree, x = Tree().eval(), torch.ones(2, 4)
    trace = traces.record_torch(tree, x)
    assert list(trace.taps) == ["a", "a#2", "b.inner", "b.relu", "b.0", "b.1.sum", "output"]
    assert trace.left_out == {"unused": "never called"}
    assert np.array_equal(trace.inputs["0"], np.ones((2, 4)))
    assert trace.environment["training"] == "no"
    with torch.no_grad():
        assert np.array_equal(trace.taps["a#2"], tree.a(tree.a(x)).numpy())
    # The in-place ReLU has overwritten the linear map's output in the model, not in the trace.
    assert (trace.taps["b.inner"] < 0).any()


def test_a_recorded_torch_module_keeps_no_hook_even_if_it_raised():
    tree = Tree()
    for x in (torch.ones(2, 4), torch.ones(2, 9)):
        try:
            traces.record_torch(tree, x)
        except RuntimeError:
            assert x.shape == (2, 9)
    assert not any(part._forward_hooks for part in tree.modules())


def test_keyword_inputs_and_methods_of_a_torch_module_are_recorded():
    trace = traces.record_torch(Tree().twice, x=torch.ones(2, 4))
    assert list(trace.inputs) == ["x"]
    assert list(trace.taps)[-1] == "output"
    assert np.array_equal(trace.taps["output"], trace.taps["b.0"] * 2)


def test_gradients_follow_in_the_order_of_backpropagation():
    trace = traces.record_torch(Tree(), torch.ones(2, 4), loss=lambda y: y.square().sum(), include="a|out")
    assert list(trace.taps) == ["a", "a#2", "output", "grad.output", "grad.a#2", "grad.a"]
    assert np.allclose(trace.taps["grad.output"], 2 * trace.taps["output"])


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_compiled_torch_module_is_refused():
    inner = Tree()
    inner.a = torch.jit.script(inner.a)
    for module, name in ((torch.compile(Tree(), backend="eager"), "output"), (inner, "a")):
        with pytest.raises(InputError, match=f"{name} is compiled, so hooks would see nothing: record the module"):
            traces.record_torch(module, torch.ones(2, 4))
    with pytest.raises(InputError, match=r"takes an nn\.Module or a method of one, got function"):
        traces.record_torch(lambda x: x)


# -- Flax --------------------------------------------------------------------------------


class Base(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.lin = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin(x)


class Derived(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + 1


class Inheriting(Base):
    pass


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Derived(rngs), Inheriting(rngs), Base(rngs)])
        self.unused, self.drop = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        for layer in (*self.layers, self.layers[0]):
            x = layer(x)
        return {"x": self.drop(x, deterministic=True)}

    def encode(self, x: jax.Array) -> jax.Array:
        return self.layers[0](x)

    def jitted(self, x: jax.Array) -> jax.Array:
        return jax.jit(lambda x: self.layers[0](x))(x)

    def copied(self, x: jax.Array) -> jax.Array:
        return nnx.jit(lambda layer, x: layer(x))(self.layers[0], x)


def test_nnx_modules_are_taps_in_the_order_they_finish():
    model, x = Model(nnx.Rngs(0)), jnp.ones((2, 4))
    trace = traces.record_flax(model, x)
    layers = [f"layers.{i}{part}" for i in range(3) for part in (".lin", "")]
    assert list(trace.taps) == [*layers, "layers.0.lin#2", "layers.0#2", "drop", "output.x"]
    assert trace.left_out == {"unused": "never called"}
    assert np.array_equal(trace.taps["layers.0"], np.asarray(model.layers[0](x)))
    assert np.array_equal(trace.taps["output.x"], np.asarray(model(x)["x"]))


def test_a_recorded_nnx_class_is_as_it_was_even_if_the_model_raised():
    before = {cls: (vars(cls).get("__call__"), cls.__call__) for cls in (Base, Derived, Inheriting, nnx.Linear)}
    for x in (jnp.ones((2, 4)), jnp.ones((2, 9))):
        try:
            traces.record_flax(Model(nnx.Rngs(0)), x)
        except TypeError:
            assert x.shape == (2, 9)
    assert {cls: (vars(cls).get("__call__"), cls.__call__) for cls in before} == before


def test_a_method_of_an_nnx_module_is_recorded():
    trace = traces.record_flax(Model(nnx.Rngs(0)).encode, jnp.ones((2, 4)))
    assert list(trace.taps) == ["layers.0.lin", "layers.0", "output"]
    assert "layers.1" in trace.left_out


def test_flax_under_a_transformation_is_refused_and_says_why():
    model, x = Model(nnx.Rngs(0)), jnp.ones((2, 4))
    with pytest.raises(InputError, match=r"layers\.0\.lin has no value, JAX is only tracing it: record outside jit"):
        traces.record_flax(model.jitted, x)
    with pytest.raises(InputError, match=r"a Linear ran that is no part of the recorded module: a transformation"):
        traces.record_flax(model.copied, x)
    with jax.disable_jit():
        assert "layers.0.lin" in traces.record_flax(model.jitted, x).taps


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shared = nn.Dense(4, name="shared")
        x = shared(shared(nn.LayerNorm(name="norm")(x)))
        return x, x.sum()


def test_linen_modules_are_taps_in_the_order_they_finish():
    model, x = LinenModel(), jnp.arange(8.0).reshape(2, 4)
    variables = model.init(jax.random.key(0), x)
    trace = traces.record_flax(model, variables, x)
    assert list(trace.taps) == ["norm", "shared", "shared#2", "output.0", "output.1"]
    assert np.array_equal(trace.taps["output.0"], np.asarray(model.apply(variables, x)[0]))
    assert list(trace.inputs) == ["0"]
    with pytest.raises(InputError, match="takes its variables first"):
        traces.record_flax(model)
    with pytest.raises(InputError, match="takes a Flax module or a method of one, got function"):
        traces.record_flax(lambda x: x, x)


def test_the_recorder_is_chosen_by_what_is_recorded():
    chosen = [
        record_any(Tree(), torch.ones(2, 4)),
        record_any(Model(nnx.Rngs(0)).encode, jnp.ones((2, 4))),
        record_any(lambda x: {"x": x}, np.ones(1)),
    ]
    assert [trace.environment.get("recorder") for trace in chosen] == ["torch", "flax nnx", None]


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_one_framework_is_recorded_without_the_other(framework: str):
    blocked = {"torch": ("jax", "jaxlib", "flax"), "flax": ("torch",)}[framework]
    model = {
        "torch": "import torch\nmodel, x = torch.nn.Linear(2, 2), torch.ones(1, 2)\n",
        "flax": "import jax.numpy as jnp\nfrom flax import nnx\n"
        "model, x = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2))\n",
    }[framework]
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\n{model}"
    code += f"from oracle import traces\nprint(list(traces.record_{framework}(model, x).taps))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "['output']\n", ran.stderr


# -- The command -------------------------------------------------------------------------

CONFIG = models.MODELS["llama"] | {"num_hidden_layers": 1, "max_position_embeddings": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and the checkpoint imported from it."""
    place = tmp_path_factory.mktemp("traces")
    source = models.write(CONFIG, place / "hf", "float32", seed=77)
    subject.import_folder(source, place / "checkpoint")
    return source, place / "checkpoint"


def test_a_stored_trace_of_the_reference_replays_against_a_checkpoint(folders: tuple[Path, Path], tmp_path: Path):
    source, checkpoint = folders
    baseline, truth = tmp_path / "baseline.trace", tmp_path / "truth.trace"
    only = ["--include", "residual|logits"]
    assert main(["record", "--reference", str(source), "--out", str(baseline), *only]) == 0
    assert main(["record", "--reference", str(source), "--dtype", "float64", "--out", str(truth), *only]) == 0
    assert list(traces.load(baseline).taps) == ["layers.0.attn_residual", "layers.0.mlp_residual", "logits"]
    assert main(["diff", str(baseline), str(checkpoint)]) == 0
    assert main(["diff", str(baseline), str(checkpoint), "--truth", str(truth)]) == 0
    assert main(["diff", str(baseline), str(checkpoint), "--dtype", "bfloat16"]) == 0
    stored = traces.load(baseline)
    wrong = {name: tap * (1.001 if name == "logits" else 1) for name, tap in stored.taps.items()}
    traces.save(dataclasses.replace(stored, taps=wrong), baseline)
    report = tmp_path / "report.json"
    assert main(["diff", str(baseline), str(checkpoint), "--json", str(report)]) == 1
    assert json.loads(report.read_text())["first_divergence"]["tap"] == "logits"


def test_a_replay_needs_no_torch(folders: tuple[Path, Path], tmp_path: Path):
    trace = tmp_path / "own.trace"
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from oracle.__main__ import main\n"
        f"record = main(['record', {str(folders[1])!r}, '--out', {str(trace)!r}, '--prompt-ids', '5,6,7'])\n"
        f"sys.exit(record or main(['diff', {str(trace)!r}, {str(folders[1])!r}]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert traces.load(trace).inputs["ids"].tolist() == [[5, 6, 7]]


def test_a_callable_is_recorded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_to_trace.py").write_text("import numpy as np\ndef taps():\n    return {'a': np.ones(2)}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["record", "--callable", "mine_to_trace:taps", "--out", "a.trace"]) == 0
    assert list(traces.load("a.trace").taps) == ["a"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys\nsys.exit(0)\n", "cannot import mine_to_trace: it called sys.exit(0) and returned nothing"),
        ("1 +\n", "cannot import mine_to_trace: it raised SyntaxError: invalid syntax"),
        ("raise ValueError('no data\\nat all')\n", "cannot import mine_to_trace: it raised ValueError: no data"),
    ],
)
def test_a_program_that_ends_while_it_is_imported_is_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, message: str
):
    (tmp_path / "mine_to_trace.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_trace", raising=False)
    assert main(["record", "--callable", "mine_to_trace:taps", "--out", "a.trace"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not Path("a.trace").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments checkpoint --reference --callable is required"),
        (["nothing/here"], "nothing/here"),
        (["{checkpoint}", "--dtype", "float64"], "record the float64 truth with --reference"),
        (["{checkpoint}", "--prompt-ids", "1,x"], "--prompt-ids takes whole numbers between commas, got '1,x'"),
        (["{checkpoint}", "--prompt-ids", "1,2", "--prompt-ids", "3"], "must have one length, got [1, 2]"),
        (["{checkpoint}", "--prompt-ids", "1,131"], "token 131 outside vocabulary 0–130"),
        (["{checkpoint}", "--prompt-ids=-1,3"], "token -1 outside vocabulary"),
        (["{checkpoint}", "--prompt-ids", "99999999999"], "token 99999999999 is outside every vocabulary"),
        (["{checkpoint}", "--prompt-ids", ",".join("1" * 25)], "are 25 tokens a row; the model's limit is 24"),
        (["{checkpoint}", "--include", "nosuchtap"], "nothing was recorded"),
        (["--reference", "nothing/hf"], "the reference cannot load nothing/hf"),
        (["--callable", "nocolon"], "takes MODULE:FUNCTION"),
        (["--callable", "no_such_module:f"], "--callable cannot import no_such_module"),
        (["--callable", "json:nothing"], "json has no function nothing"),
        (["--callable", "json:loads"], "json:loads raised TypeError: "),
        (["--callable", "sys:exit"], "sys:exit called sys.exit(None) and returned nothing to record"),
        (["--callable", ".:f"], "takes MODULE:FUNCTION"),
        (["--callable", "json:loads", "--dtype", "float32"], "are for a checkpoint or --reference"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folders: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    given = [argument.format(checkpoint=folders[1]) for argument in arguments]
    assert main(["record", *given, "--out", str(tmp_path / "x.trace")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_does_not_exist_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]):
    assert main(["record", "nothing", "--out", "no/such/x.trace"]) == 2
    assert "--out: the folder no/such does not exist" in capsys.readouterr().err
