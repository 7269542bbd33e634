"""Config fields that differ from the reference folder's config.json, each put right by itself."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jaxgpt import weights
from jaxgpt.config import ModelConfig, from_hf
from jaxgpt.errors import InputError
from oracle import ladder
from oracle.repairs import facts
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import bits
from oracle.rungs.bits import ParameterSite
from oracle.site import Site

RUNGS = tuple(name for name in ladder.LADDER if name not in ("environment", "ids", "statistics", "golden"))
HF_NAMES = {
    "hidden_size": "hidden_size or n_embd",
    "intermediate_size": "intermediate_size or n_inner",
    "num_hidden_layers": "num_hidden_layers or n_layer",
    "num_attention_heads": "num_attention_heads or n_head",
    "max_position_embeddings": "max_position_embeddings or n_positions",
    "rms_norm_eps": "rms_norm_eps or layer_norm_epsilon",
    "hidden_act": "hidden_act or activation_function",
    "rope_theta": "rope_theta, also inside rope_parameters",
    "rope_scaling": "rope_scaling or rope_parameters",
    "qkv_bias": "attention_bias, or the model type",
    "attention_output_bias": "attention_bias",
}
"""What a field is called in config.json, where the name is another."""
IMPORT_AGAIN = "; where the checkpoint was made from another config.json, import it again"


@cache
def _read(path: Path, modified: int) -> ModelConfig | None:
    try:
        return from_hf(json.loads(path.read_text("utf-8")))
    except (InputError, ValueError):
        return None


def folders(site: Site) -> ModelConfig | None:
    """The config of the reference's folder; None if there is no folder, or it is not understood."""
    place = site.comparison.source or site.comparison.export
    path = place / "config.json" if place else None
    return _read(path, path.stat().st_mtime_ns) if path and path.exists() else None


def different(site: Site) -> dict[str, Any]:
    """The fields that differ, with the folder's values; without a folder, what the reference was made of tells."""
    theirs, ours = site.once(folders), site.candidate.config
    names = [field.name for field in dataclasses.fields(ModelConfig)] if theirs else []
    fields = {name: getattr(theirs, name) for name in names if getattr(theirs, name) != getattr(ours, name)}
    layers = facts.of(site.comparison.reference).layers
    return fields | ({"num_hidden_layers": layers} if layers != ours.num_hidden_layers else {})


def _with(site: Site, fields: dict[str, Any], change: str) -> Iterator[Variant]:
    try:
        config = dataclasses.replace(site.candidate.config, **fields)
    except InputError:  # this field alone contradicts the others
        return
    candidate = dataclasses.replace(site.candidate, config=config)
    if isinstance(site, ParameterSite):
        candidate = _completed(candidate, site)
    elif any(parameter.name not in candidate.stored for parameter in weights.parameters(config)):
        return  # it would not run
    yield Variant(change, candidate)


def _completed(candidate: Any, site: ParameterSite) -> Any:
    """With the parameters that the config asks for, and no others: it decides which are loaded."""
    names = {parameter.name for parameter in weights.parameters(candidate.config)}
    lacking = {n: site.file[n] for n in names if n not in candidate.stored and n in site.file}
    left_over = [name for name in candidate.stored if name not in names and name not in site.file]
    return bits.without(bits.with_parameters(candidate, lacking), *left_over)


def _field(name: str) -> Callable[[Site], Iterator[Variant]]:
    def variants(site: Site) -> Iterator[Variant]:
        fields = site.once(different)
        if name in fields:
            ours, theirs = getattr(site.candidate.config, name), fields[name]
            yield from _with(
                site, {name: theirs}, f"with {name} {_shown(theirs)}, as the folder says, not {_shown(ours)}"
            )

    return variants


def _shown(value: Any) -> str:
    if not dataclasses.is_dataclass(value):
        return str(value)
    return f"({', '.join(f'{f.name} {getattr(value, f.name)}' for f in dataclasses.fields(value))})"


def _together(site: Site) -> Iterator[Variant]:
    fields = site.once(different)
    if len(fields) > 1:
        yield from _with(site, fields, f"with the folder's {', '.join(fields)}")


def _advice(name: str) -> str:
    return f"how jaxgpt/config.py reads {name} from config.json (there: {HF_NAMES.get(name, name)}){IMPORT_AGAIN}"


_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
REPAIRS: tuple[Repair, ...] = (
    *(
        Repair(f"config field {name} differs from the folder's", _advice(name), RUNGS, _field(name), is_seen=True)
        for name in _FIELDS
    ),
    Repair(
        "several config fields differ from the folder's",
        f"how they are read from config.json in jaxgpt/config.py{IMPORT_AGAIN}",
        RUNGS,
        _together,
        last_resort=True,
    ),
)
"""One for each field, then for fields that only fit together."""
