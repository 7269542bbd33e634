"""How RoPE frequencies are stretched beyond the trained context: linear, llama3 and yarn.

`read` and `keys` translate Hugging Face's `rope_parameters` (transformers 5) and
`rope_scaling` (4), as `jaxgpt.config` does the rest of config.json: strictly.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from jaxgpt import field_checks
from jaxgpt.errors import InputError, first
from jaxgpt.field_checks import shortened
from jaxgpt.hf_keys import REQUIRED_VALUES


@dataclass(frozen=True)
class RopeScaling:
    """One way of stretching RoPE (transformers 5.23, `modeling_rope_utils.py`).

    `linear` divides every frequency by `factor`; `llama3` divides only the slow
    ones and blends in between (Llama 3.1); `yarn` blends over the range of dimensions
    that turn between `beta_slow` and `beta_fast` times in the old context, and
    multiplies cosines and sines (Peng et al. 2023). Fields of another kind are not read.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    """Dimensions that turn more often than this in the old context stay."""
    beta_slow: float = 1.0
    """Those that turn less often are divided by `factor`."""
    attention_factor: float | None = None
    """Of cosines and sines; None derives it from `factor`, see `magnitude`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """The range of dimensions ends at whole numbers."""

    def __post_init__(self) -> None:
        field_checks.one_of("rope_scaling.rope_type", self.rope_type, tuple(_KEYS)[1:])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            field_checks.positive(f"rope_scaling.{name}", getattr(self, name))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                field_checks.positive(f"rope_scaling.{name}", getattr(self, name))
        field_checks.switch("rope_scaling.truncate", self.truncate)
        field_checks.size("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings)
        if self.factor < 1.0:
            raise InputError(f"rope_scaling.factor must be >= 1, got {self.factor}")
        low, high = ("beta_slow", "beta_fast") if self.rope_type == "yarn" else ("low_freq_factor", "high_freq_factor")
        if self.rope_type != "linear" and getattr(self, high) <= getattr(self, low):
            raise InputError(
                f"rope_scaling.{high} must exceed {low}, got {getattr(self, high)} and {getattr(self, low)}"
            )

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by: 1 but for yarn (Peng et al. 2023, eq. 22)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self._magnitude(1.0)
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeScaling":
        """Inverse of `dataclasses.asdict`; raises InputError for unknown or missing keys."""
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(map(str, values.keys() - known.keys()))
        if unknown:
            raise InputError(f"rope_scaling has unknown keys {first(unknown)}; this version knows {', '.join(known)}")
        missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
        if missing:
            raise InputError(f"rope_scaling lacks {first(missing)}")
        return cls(**values)


# -- Hugging Face config.json ----------------------------------------------------------

_ALWAYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor",),
        (_ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Keys of each rope type: those it needs, and those it reads where they are."""


def read(hf: Mapping[str, Any], context: Any) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling of a config.json whose context is `context` tokens.

    Raises:
        InputError: a kind or a key that is not built here, or a value that cannot be.
    """
    key, parameters = _parameters(hf)
    theta = _given(parameters, "rope_theta", _given(hf, "rope_theta", 10000.0))
    rope_type: Any = parameters.get("rope_type", parameters.get("type", "default"))
    field_checks.one_of(f"config.json: rope_type of {key}", rope_type, tuple(_KEYS))
    needed, optional = _KEYS[rope_type]
    missing = sorted(name for name in needed if name not in parameters)
    unknown = sorted(map(str, parameters.keys() - {*needed, *optional} - _ALWAYS))
    if missing:
        raise InputError(f"config.json has rope type {rope_type!r} without {first(missing)}")
    if unknown:
        raise InputError(
            f"config.json has rope type {rope_type!r} with {first(unknown)}, which it does not read; "
            "check rope_type, or remove them"
        )
    if rope_type == "default":
        return theta, None
    # A truncate of null is false to transformers; other keys of null are as if they were missing.
    nulls = {name for name in optional if parameters.get(name) is None and name != "truncate"}
    values = {name: parameters[name] for name in (*needed, *optional) if name in parameters and name not in nulls}
    return theta, RopeScaling(rope_type, **({_ORIGINAL: context} if rope_type == "yarn" else {}) | values)


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if values.get(key) is None else values[key]


def _parameters(hf: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key that is read, and its object."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    parameters = _given(hf, key, {})
    if not isinstance(parameters, Mapping):
        raise InputError(f"config.json has {key}={shortened(parameters)}; expected an object with rope_type")
    if parameters.get("partial_rotary_factor") not in REQUIRED_VALUES["partial_rotary_factor"]:
        raise InputError(f"config.json has partial_rotary_factor in {key}; jaxgpt rotates whole heads only")
    return key, parameters


def keys(scaling: RopeScaling | None) -> dict[str, Any]:
    """The object that `read` reads, without theta; empty for no scaling."""
    if scaling is None:
        return {}
    needed, optional = _KEYS[scaling.rope_type]
    defaults = {f.name: f.default for f in fields(RopeScaling) if f.name != _ORIGINAL}
    said = [name for name in optional if name not in defaults or getattr(scaling, name) != defaults[name]]
    return {name: getattr(scaling, name) for name in ("rope_type", *needed, *said)}
