"""Parameters that hold each other's tensors: within a layer, or whole layers in another order."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.weights.layouts import biases_alone
from oracle.repairs.weights.parameter_repair import Undo, changed, repair
from oracle.rungs.bits import HEAD, ParameterSite, equal

ORDER = "a layer's index is a number: sort by int, not by text, where tensors are read "
LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def layer_of(name: str) -> tuple[int, str] | None:
    """`layers.3.attn.q.kernel` as (3, `attn.q.kernel`); None outside the layers."""
    match = LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def held(site: ParameterSite) -> Mapping[str, str]:
    """For each of our parameters that holds the tensor of another name, that name."""
    by_look: dict[tuple[object, ...], list[str]] = {}
    for name, array in site.file.items():
        by_look.setdefault(_look(array), []).append(name)
    found: dict[str, str] = {}
    for name, array in site.candidate.stored.items():
        ours = np.asarray(array)
        alike = by_look.get(_look(ours), [])
        # Constant ones and zeros are alike without ever having been exchanged.
        if name not in alike and (ours != ours.flat[0]).any():
            other = next((other for other in alike if equal(ours, site.file[other])), None)
            found |= {} if other is None else {name: other}
    return found


def _look(array: np.ndarray) -> tuple[object, ...]:
    """Equal for equal tensors, and for hardly any others."""
    per_axis = 64 if array.ndim == 1 else 8
    few = array[tuple(slice(None, None, max(1, length // per_axis)) for length in array.shape)]
    return array.shape, few.astype(np.float32).tobytes()


# -- Within a layer --------------------------------------------------------------------


def _cycle(site: ParameterSite) -> list[str]:
    """The parameters that changed places in a ring with this one; each holds the next one's tensor."""
    holds = site.once(held)
    ring = [site.name]
    while (following := holds.get(ring[-1])) is not None and following not in ring:
        ring.append(following)
    closed = len(ring) > 1 and holds.get(ring[-1]) == site.name
    return ring if closed else []


def _among(*allowed: Sequence[str]) -> Undo:
    """Exchanges among the modules of one of these groups, in one layer."""

    def exchanged(site: ParameterSite) -> Iterator[Variant]:
        ring = site.once(_cycle)
        places = [layer_of(name) for name in ring]
        layers = {place[0] for place in places if place}
        modules, leaves = ({place[1].rpartition(".")[part] for place in places if place} for part in (0, 2))
        one_by_one = len(layers) == len(leaves) == 1 and len(modules) == len(ring)
        if ring and None not in places and one_by_one and any(modules <= set(group) for group in allowed):
            yield _put_back(site, ring)

    return exchanged


def _of_heads(biases: bool) -> Undo:
    """Query, key and value: biases whose kernels are right, or anything else."""

    def undo(site: ParameterSite) -> Iterator[Variant]:
        if biases_alone(site) == biases:
            yield from _among(_NAMED[0])(site)

    return undo


_NAMED = (
    *(("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"), ("attn_norm", "mlp_norm")),
    ("attn.q_norm", "attn.k_norm"),
)


def _others(site: ParameterSite) -> Iterator[Variant]:
    """Any other exchange; whole layers have repairs of their own."""
    ring = site.once(_cycle)
    places = [layer_of(name) for name in ring]
    same_path = None not in places and len({place[1] for place in places if place}) == 1
    if ring and not same_path and next(_among(*_NAMED)(site), None) is None:
        yield _put_back(site, ring)


def _put_back(site: ParameterSite, ring: Sequence[str]) -> Variant:
    biases = [f"{name.removesuffix('.kernel')}.bias" for name in ring]
    together = all(site.once(held).get(name) == following for name, following in _next(biases))
    # Biases that went with their kernels are no mistake of their own.
    pairs = [*_next(ring), *(_next(biases) if together else ())]
    values = {site_of: np.asarray(site.candidate.stored[name]) for name, site_of in pairs}
    return changed(site, f"with {' and '.join(name for name in ring)} exchanged", values)


def _next(ring: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(ring, [*ring[1:], ring[0]], strict=True)


# -- Whole layers ----------------------------------------------------------------------


def _layers_by_path(site: ParameterSite) -> dict[str, list[int]]:
    """For each kind of parameter, the layer whose tensor each layer holds; itself if no other's."""
    count = site.candidate.config.num_hidden_layers
    orders: dict[str, list[int]] = {}
    for name, other in site.once(held).items():
        ours, theirs = layer_of(name), layer_of(other)
        if ours and theirs and ours[1] == theirs[1] and ours[0] < count:
            orders.setdefault(ours[1], list(range(count)))[ours[0]] = theirs[0]
    return orders


def lexicographic(order: Sequence[int]) -> bool:
    """0, 1, 10, 11, 2, …, or what undoes it."""
    by_text = sorted(range(len(order)), key=str)
    return list(order) in (by_text, [by_text.index(i) for i in range(len(order))])


def backwards(order: Sequence[int]) -> bool:
    """The last first."""
    return list(order) == list(range(len(order)))[::-1]


def shifted(order: Sequence[int]) -> bool:
    """Each holds its neighbour's, and one end the other end's."""
    return any(list(order) == [(i + by) % len(order) for i in range(len(order))] for by in (1, -1))


def exchanged(order: Sequence[int]) -> bool:
    """Two layers have changed places."""
    return sum(i != j for i, j in enumerate(order)) == 2


def _without_a_name(order: Sequence[int]) -> bool:
    return not any(named(order) for named in (lexicographic, backwards, shifted, exchanged))


def _layers(kind: Callable[[Sequence[int]], bool]) -> Undo:
    def reordered(site: ParameterSite) -> Iterator[Variant]:
        place, orders = layer_of(site.name), site.once(_layers_by_path)
        order = orders.get(place[1], []) if place else []
        if sorted(order) == list(range(len(order))) and order and kind(order):
            together = [path for path, other in orders.items() if other == order]
            values = {
                f"layers.{theirs}.{path}": np.asarray(site.candidate.stored[f"layers.{ours}.{path}"])
                for path in together
                for ours, theirs in enumerate(order)
            }
            yield changed(site, f"with the layers, which are {_shown(order)}, in order", values)

    return reordered


def _shown(order: Sequence[int]) -> str:
    return ", ".join(map(str, order[:8])) + (", …" if len(order) > 8 else "")


def overrun(site: ParameterSite) -> Iterator[Variant]:
    """Each layer holds its neighbour's tensors, and those of one end are lost."""
    place, orders = layer_of(site.name), site.once(_layers_by_path)
    order = orders.get(place[1], []) if place else []
    moved = {j - i for i, j in enumerate(order) if i != j}
    kept = sum(i == j for i, j in enumerate(order))
    if len(order) < 3 or sorted(order) == list(range(len(order))) or len(moved) != 1 or kept != 1:
        return
    names = [f"layers.{i}.{path}" for path, other in orders.items() if other == order for i in range(len(order))]
    if moved <= {1, -1}:
        yield changed(site, "with the file's tensors of each layer", {name: site.file[name] for name in names})


def another(site: ParameterSite) -> Iterator[Variant]:
    """The tensor of another name, whose own place holds no part of the exchange."""
    other = site.once(held).get(site.name)
    open_end = not site.once(_cycle) and site.name != HEAD
    theirs = site.theirs
    if other is not None and open_end and theirs is not None and next(overrun(site), None) is None:
        yield changed(site, f"with its own tensor in place of {other}'s", {site.name: theirs})


_TABLE = "in the name table (jaxgpt/weights.py)"
EXCHANGES: tuple[Repair, ...] = (
    repair(
        "query, key and value swapped",
        f"which tensor, or which part of a fused one, is q, k and v: the rows attn.q, attn.k and attn.v {_TABLE}",
        _of_heads(biases=False),
    ),
    repair(
        "only biases of query, key and value swapped",
        f"the kernels are right: the rows attn.q.bias, attn.k.bias and attn.v.bias {_TABLE}",
        _of_heads(biases=True),
    ),
    repair("gate and up swapped", f"the rows mlp.gate and mlp.up {_TABLE}", _among(_NAMED[1])),
    repair("query and key norms swapped", f"the rows attn.q_norm and attn.k_norm {_TABLE}", _among(_NAMED[3])),
    repair("attention and MLP norms swapped", f"the rows attn_norm and mlp_norm {_TABLE}", _among(_NAMED[2])),
    repair("parameters of equal shape swapped", f"the rows of the two {_TABLE}", _others),
)
LAYERS: tuple[Repair, ...] = tuple(
    repair(name, advice, _layers(kind))
    for name, advice, kind in (
        ("layers in lexicographic order", f"{ORDER}(jaxgpt/formats/hf.py)", lexicographic),
        ("layers in reversed order", "count layers from the input (jaxgpt/formats/hf.py)", backwards),
        ("layers shifted by one", "layers are counted from 0 in the files (jaxgpt/formats/hf.py)", shifted),
        ("layers swapped", "the layer's number in the names (jaxgpt/formats/hf.py)", exchanged),
        ("layers in another order", "the layer's number in the names (jaxgpt/formats/hf.py)", _without_a_name),
    )
)
REPAIRS: tuple[Repair, ...] = (*LAYERS, *EXCHANGES)
LOSSES: tuple[Repair, ...] = (
    repair(
        "layers shifted by one",
        "layers are counted from 0 in the files (jaxgpt/formats/hf.py)",
        overrun,
        last_resort=True,
    ),
    repair("another parameter's tensor loaded", f"the row of the parameter {_TABLE}", another, last_resort=True),
)
"""Where a tensor is gone because another was loaded over it."""
