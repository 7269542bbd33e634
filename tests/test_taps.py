"""The table of ops: complete, in order, and true to its documentation."""

import dataclasses
import inspect
import re
from functools import partial
from itertools import product

import conftest
import jax
import jax.numpy as jnp
import pytest

from jaxgpt import cache, model, taps, weights
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS
from jaxgpt.taps import INPUTS, INTERNAL_TO_FUSED_ATTENTION, Wiring

WIRINGS = [Wiring(*flags) for flags in product([False, True], repeat=3)]
NAMES = ["cached", "dropout", "fused_attention"]
every_wiring = pytest.mark.parametrize(
    "wiring", WIRINGS, ids=lambda w: "+".join(n for n in NAMES if getattr(w, n)) or "-"
)


@every_wiring
def test_each_op_reads_inputs_and_earlier_taps_only_and_no_tap_is_written_twice(config: ModelConfig, wiring: Wiring):
    layers = range(config.num_hidden_layers)
    known = {*INPUTS} | ({"rng"} if wiring.dropout else set())
    known |= {f"cache.{i}.{what}" for i in layers for what in ("keys", "values")} if wiring.cached else set()
    for op in taps.ops(config, wiring):
        assert set(op.inputs) <= known, op
        assert op.tap not in known, op
        known.add(op.tap)


@every_wiring
def test_every_tap_but_the_logits_is_read_by_a_later_op(config: ModelConfig, wiring: Wiring):
    ops = taps.ops(config, wiring)
    assert {op.tap for op in ops} - {name for op in ops for name in op.inputs} == {"logits"}


@every_wiring
def test_the_table_reads_every_parameter_and_names_functions_that_take_its_inputs(config: ModelConfig, wiring: Wiring):
    modules = {p.name.rsplit(".", 1)[0] for p in weights.parameters(config)}
    ops = taps.ops(config, wiring)
    assert {op.parameters for op in ops if op.parameters} == modules
    for op in ops:
        assert len(inspect.signature(FUNCTIONS[op.function]).parameters) == 2 + len(op.inputs), op


def test_every_function_is_used_by_some_wiring():
    used = {
        op.function for config in conftest.CONFIGS.values() for wiring in WIRINGS for op in taps.ops(config, wiring)
    }
    assert used == FUNCTIONS.keys()


def test_a_wiring_changes_only_the_taps_it_says():
    config = conftest.LLAMA
    plain = taps.names(config)
    layers = range(config.num_hidden_layers)
    fused = taps.names(config, Wiring(fused_attention=True))
    inside = {f"layers.{i}.{name}" for i in layers for name in INTERNAL_TO_FUSED_ATTENTION}
    assert fused == tuple(name for name in plain if name not in inside)
    cached = taps.names(config, Wiring(cached=True))
    stored = {f"layers.{i}.attn.{name}" for i in layers for name in ("keys", "values")}
    assert tuple(name for name in cached if name not in stored) == plain
    dropped = taps.names(config, Wiring(dropout=True))
    assert tuple(name for name in dropped if "dropped" not in name) == plain


def documented() -> dict[str, str]:
    """Tap, with i for the layer, to shape, from the module's table."""
    shapes: dict[str, str] = {}
    rows = [line.strip("| ").split("|") for line in (taps.__doc__ or "").splitlines() if line.startswith("| ")]
    for cells in rows[2:]:
        for names, shape in zip(cells[::2], cells[1::2], strict=False):
            names, shape = re.sub(r"\(.*\)", "", names).strip(), shape.strip()
            parts = [part.strip() for part in re.split(r",|/", names) if part.strip()]
            for part in parts:
                # `layers.i.attn.q / k / v`: what follows shares the first one's prefix.
                full = part if "." in part or part in ("mask", "logits", "final_norm") else f"{prefix(parts[0])}{part}"
                shapes[full] = shape
    return shapes


def prefix(name: str) -> str:
    return name[: name.rindex(".") + 1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_the_shapes_of_the_documentation_are_those_of_the_arrays(name: str):
    config = dataclasses.replace(conftest.CONFIGS[name], num_hidden_layers=1)
    params, ids = conftest.random_params(config), conftest.random_ids(config, 2, 5)
    store = cache.empty(config, 2, 64, jnp.float32)
    values = jax.eval_shape(partial(model.forward_cached, config), params, ids, jnp.array([5, 4]), store)[0].taps
    sizes = {"B": 2, "T": 5, "S": 64, "D": config.hidden_size, "F": config.intermediate_size, "V": config.vocab_size}
    sizes |= {"N": config.num_attention_heads, "K": config.num_key_value_heads, "H": config.head_dim, "1": 1}
    sizes |= {"N·H": sizes["N"] * sizes["H"], "K·H": sizes["K"] * sizes["H"], "H/2": sizes["H"] // 2}
    heads = {"q": "B N T H", "k": "B K T H", "v": "B K T H"}
    table = documented()
    for tap, array in values.items():
        letter = tap.split(".")[-1][0]
        shape = table[tap.replace("layers.0", "layers.i")]
        if shape == "B T N·H, K·H":
            shape = "B T N·H" if letter == "q" else "B T K·H"
        elif shape in ("B N T H, B K T H", "as heads"):
            shape = heads[letter]
        assert array.shape == tuple(sizes[axis] for axis in shape.split()), tap
