"""Where the arrays of a run lie when it has several devices: a mesh with axes data, fsdp and tensor.

The rows of a batch are split over data and fsdp. Parameters, and with them AdamW's
moments, are split over fsdp and tensor. An op that needs a parameter gathers it over
fsdp in the compute dtype (ZeRO-3, Rajbhandari et al. 2020) and keeps its split over
tensor: first matrices by columns, last ones by rows (Megatron-LM, Shoeybi et al.
2019). These placements are said here, at the parameters and at the residual stream;
which messages follow from them is XLA's to find (GSPMD, Xu et al. 2021).

One device is a mesh that places nothing (`ALONE`): its program is that of `jaxgpt.model`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from jaxgpt import device, model, taps, weights
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.ops import FUNCTIONS, Leaves, OpFunction
from jaxgpt.parallel_settings import MeshSettings

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""What splits the rows of a batch."""

_COLUMNS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
"""Modules whose outputs are split over tensor: whole heads, or hidden units of the MLP."""
_BY_ROWS = ("attn.out", "mlp.down")
"""Modules that sum over what those split."""
_BY_VOCABULARY = ("embed.tokens.weight", "head.weight")
_STREAM = ("embed", "add")
"""Functions whose output is the residual stream, split by rows."""


@dataclass(frozen=True)
class Layout:
    """A mesh, or none, and what lies where on it. Hashable: a static argument of jitted functions."""

    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """How many the run uses, over all processes."""
        return self.mesh.size if self.mesh else 1

    @property
    def row_shards(self) -> int:
        """Into how many parts a batch's rows are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    @property
    def parameter_shards(self) -> int:
        """Into how many memories a large parameter is split; CPU devices have one."""
        split = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] if self.mesh else 1
        return split if jax.default_backend() != "cpu" else 1

    @property
    def local_devices(self) -> int:
        """How many of them are this process's."""
        return len(self.mesh.local_devices) if self.mesh else 1

    def describe(self) -> str:
        """`cpu`, or `8 × NVIDIA H200 (data 4, fsdp 2)`."""
        if self.mesh is None:
            return device.describe()
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        return f"{self.devices} × {device.describe()}" + (f" ({axes})" if axes else "")

    def parameter(self, name: str, shape: tuple[int, ...], *, used: bool = False) -> Sharding | None:
        """Where the parameter lies at rest, or where ops use it: gathered over fsdp. None without a mesh."""
        if self.mesh is None:
            return None
        axes = _split(name, len(shape))
        return self._sharding(shape, [() if not axis or (used and axis == "fsdp") else (axis,) for axis in axes])

    def parameters(self, config: ModelConfig) -> dict[str, Sharding] | None:
        """Of every parameter at rest."""
        found = {p.name: self.parameter(p.name, p.shape) for p in weights.parameters(config)}
        return {name: sharding for name, sharding in found.items() if sharding} or None

    def place(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Whole parameters, the same in every process, as they lie at rest; untouched without a mesh."""
        if self.mesh is None:
            return params
        return {name: _placed(array, self.parameter(name, array.shape)) for name, array in params.items()}

    def spread(self, state: Any) -> Any:
        """A tree of arrays of which those that lie on one device only are brought to all."""
        whole = NamedSharding(self.mesh, PartitionSpec()) if self.mesh else None
        return jax.tree.map(lambda a: a if isinstance(a.sharding, NamedSharding) else _placed(a, whole), state)

    def like(self, array: np.ndarray, placed: Array) -> Array:
        """A whole array where another of its shape lies."""
        return _placed(array, placed.sharding if self.mesh else None)

    def rows(self, arrays: Mapping[str, Any], *, axis: int = 0) -> dict[str, Array]:
        """A batch, the same in every process, split along its axis of rows; whole where they cannot be split."""
        if self.mesh is None:
            return jax.device_put(dict(arrays))  # jnp.asarray would be one more program for each shape
        return {name: _placed(array, self.row_sharding(array.shape, axis=axis)) for name, array in arrays.items()}

    def row_sharding(self, shape: tuple[int, ...], *, axis: int = 0) -> Sharding | None:
        """Where `rows` puts an array of this shape; None without a mesh."""
        if self.mesh is None:
            return None
        return self._sharding(shape, [()] * axis + [ROWS])

    def _sharding(self, shape: tuple[int, ...], axes: Sequence[tuple[str, ...]]) -> Sharding:
        """The axes of an array split over these of the mesh; one that they do not divide stays whole.

        Spelled as XLA spells it of outputs, or the second step would look like another program's.
        """
        mesh: Any = self.mesh
        spec: list[Any] = []
        for size, names in zip(shape, axes, strict=False):
            split = tuple(name for name in names if mesh.shape[name] > 1)
            fits = size % math.prod(mesh.shape[name] for name in split) == 0
            # One name, several, or None.
            spec.append((split if split[1:] else "".join(split) or None) if fits else None)
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    def at_rest(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Inside `jit`: parameters, or their gradients, put where parameters lie."""
        return {name: _constrained(array, self.parameter(name, array.shape)) for name, array in params.items()}

    def local(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The whole parameters on this process's first device; every process must ask for them."""
        if self.mesh is None:
            return dict(params)
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(dict(params))
        return {name: array.addressable_data(0) for name, array in whole.items()}

    def forward(self, config: ModelConfig, params: model.Params, ids: Array, **given: Any) -> model.Output:
        """`model.forward`, each op with its parameters and output where this layout has them."""
        if self.mesh is None:
            return model.forward(config, params, ids, **given)
        # Split after the cast as before it, or XLA gathers float32 first and casts what it gathered.
        return model.forward(config, self.at_rest(params), ids, replace=_ops(self, config), **given)


ALONE = Layout()
"""One device."""


def layout(settings: MeshSettings, config: ModelConfig, batch_size: int, notices: list[str]) -> Layout:
    """The mesh that was asked for, over the devices of all processes.

    Raises:
        InputError: devices, rows or heads that cannot be split so; with what can.
    """
    there, fsdp, tensor = jax.device_count(), settings.fsdp or 1, settings.tensor_parallel or 1
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    if heads % tensor:
        raise InputError(
            f"tensor_parallel {tensor} does not divide the model's {config.num_attention_heads} heads and "
            f"{config.num_key_value_heads} key/value heads; lower --tensor-parallel to one of {_divisors(heads)}"
        )
    data = settings.data_parallel or _data_devices(there // (fsdp * tensor), fsdp, batch_size, notices)
    wanted = max(data, 1) * fsdp * tensor
    product = f"data_parallel {max(data, 1)} × fsdp {fsdp} × tensor_parallel {tensor}"
    if wanted > there:
        raise InputError(f"{product} needs {wanted} devices, JAX sees {there}; lower one of them")
    if jax.process_count() > 1 and wanted != there:
        raise InputError(f"{product} makes {wanted} devices, the processes have {there}; give a product of {there}")
    if batch_size % (data * fsdp):
        raise InputError(
            f"batch_size {batch_size} cannot be split evenly over {data * fsdp} devices (data_parallel {data} × "
            f"fsdp {fsdp}); give a multiple of {data * fsdp} with --batch-size, or fewer devices"
        )
    if wanted == 1:
        return ALONE
    shape = (data, fsdp, tensor)
    return Layout(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:wanted]))


def _data_devices(there: int, fsdp: int, batch_size: int, notices: list[str]) -> int:
    """As many as there are; fewer where a batch has too few rows, unless another process would have none."""
    if jax.process_count() > 1 or batch_size % fsdp:
        return there
    most = next((n for n in range(there, 0, -1) if batch_size // fsdp % n == 0), 0)
    if most < there:
        notices.append(f"{most} of {there} devices share the rows: batches of {batch_size} cannot be split over more")
    return most


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _split(name: str, rank: int) -> tuple[str, ...]:
    """Which axis of the mesh splits each axis of a parameter; empty for none."""
    module, leaf = name.rsplit(".", 1)
    if module.endswith(_COLUMNS):
        return ("fsdp", "tensor") if leaf == "kernel" else ("tensor",)
    if module.endswith(_BY_ROWS) and leaf == "kernel":
        return ("tensor", "fsdp")
    if name in _BY_VOCABULARY:
        return ("tensor", "fsdp")
    return ("", "fsdp") if rank == 2 else ("",)


def _placed(array: Any, sharding: Sharding | None) -> Array:
    if sharding is None:
        return jax.numpy.asarray(array)
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    whole = np.asarray(array)
    # Not device_put: between processes it compares the array with everybody's first.
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _constrained(array: Array, sharding: Sharding | None) -> Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


# -- The ops on a mesh -----------------------------------------------------------------


@cache
def _ops(layout: Layout, config: ModelConfig) -> Mapping[str, OpFunction]:
    """For `model.run`'s `replace`: the same functions between the placements of their arrays."""
    shapes = {p.name: p.shape for p in weights.parameters(config)}
    found: dict[str, OpFunction] = {}
    wirings = [taps.Wiring(dropout=dropout) for dropout in (False, True)]
    for op in {op for wiring in wirings for op in taps.ops(config, wiring)}:
        used = {
            leaf: layout.parameter(name, shapes[name], used=True)
            for leaf in ("weight", "kernel", "bias")
            if op.parameters and (name := f"{op.parameters}.{leaf}") in shapes
        }
        if used or op.function in _STREAM:
            found[op.tap] = partial(_placed_op, layout, op.function, used)
    return found


def _placed_op(
    layout: Layout,
    function: str,
    used: Mapping[str, Sharding | None],
    config: ModelConfig,
    p: Leaves,
    *inputs: Any,
) -> Array:
    gathered = {leaf: _constrained(array, used[leaf]) for leaf, array in p.items()}
    output = FUNCTIONS[function](config, gathered, *inputs)
    return _constrained(output, layout.row_sharding(output.shape)) if function in _STREAM else output
