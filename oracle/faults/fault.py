"""One row of the fault catalogue: a class of mistake, how it is planted, and where it must show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.config import ModelConfig
from jaxgpt.ops import OpFunction
from oracle.candidate import Candidate

Plant = Callable[[Candidate], Candidate]
Condition = Callable[[ModelConfig], bool]
BOTH = ("float32", "bfloat16")
TEXT = "text"


def everywhere(_: ModelConfig) -> bool:
    """The mistake exists in every model."""
    return True


def _never(_config: ModelConfig, _dtype: str) -> str:
    return ""


@dataclass(frozen=True)
class Fault:
    """A class of mistake at one place. Several rows may share a class."""

    name: str
    """The class, in the words of the field."""
    cause: str
    """The sentence a good diagnosis would give."""
    plant: Plant
    """Puts the mistake into a true candidate."""
    rung: str
    """Where it must show."""
    tap: Callable[[ModelConfig], str]
    """The first tap (for the rung bits: the parameter's module) that must differ."""
    applies: Condition = everywhere
    """The mistake exists in this model, right or equivalent."""
    dtypes: tuple[str, ...] = BOTH
    """Compute dtypes in which it exists."""
    equivalent: Callable[[ModelConfig, str], str] = _never
    """Why the mistake changes nothing in a model of this config and dtype; empty where it does."""
    needs: str = ""
    """`TEXT` if it takes a model with a tokenizer and a template."""
    place: str = ""
    """Tells rows of one class apart."""
    names: frozenset[str] = frozenset()
    """Names under which a diagnosis may state the cause, besides `cause` itself."""

    @property
    def id(self) -> str:
        """Unique in the catalogue."""
        return f"{self.name} ({self.place})" if self.place else self.name

    def absent(self, config: ModelConfig, dtype: str) -> str:
        """Why the mistake does not exist, or changes nothing, in a model; empty where it would show."""
        if dtype not in self.dtypes:
            return f"exists only in {' and '.join(self.dtypes)}"
        if not self.applies(config):
            needed = (self.applies.__doc__ or "").partition("\n")[0].rstrip(".")
            # "Positions are …", but "RoPE is …"
            begin = needed[:1] if needed[1:2].isupper() or needed.startswith("RoPE") else needed[:1].lower()
            return f"exists only where {begin}{needed[1:]}"
        return self.equivalent(config, dtype)

    @property
    def accepted(self) -> frozenset[str]:
        """Every right name of the cause."""
        return self.names | {self.cause}


def at(tap: str) -> Callable[[ModelConfig], str]:
    """The same tap in every model."""
    return lambda _: tap


def position_tap(config: ModelConfig) -> str:
    """The first tap that reads positions."""
    return "rope.angles" if has_rope(config) else "embed.positions"


def query_tap(config: ModelConfig) -> str:
    """The first tap that reads angles."""
    return "layers.0.attn.q_rope"


def first_mlp_tap(config: ModelConfig) -> str:
    """The first projection of layer 0's MLP."""
    return "layers.0.mlp.gate" if config.gated_mlp else "layers.0.mlp.up"


# -- What a mistake needs of a model ---------------------------------------------------


def has_rope(config: ModelConfig) -> bool:
    """Positions are rotations."""
    return config.position_embedding == "rope"


def is_learned(config: ModelConfig) -> bool:
    """Positions are rows of a table."""
    return not has_rope(config)


def is_layernorm(config: ModelConfig) -> bool:
    """Norms subtract the mean."""
    return config.norm == "layernorm"


def is_rmsnorm(config: ModelConfig) -> bool:
    """Norms do not subtract the mean."""
    return not is_layernorm(config)


def is_gated(config: ModelConfig) -> bool:
    """The MLP has a gate."""
    return config.gated_mlp


def is_tied(config: ModelConfig) -> bool:
    """The head is the embedding."""
    return config.tie_word_embeddings


def is_untied(config: ModelConfig) -> bool:
    """The head is a tensor of its own."""
    return not is_tied(config)


def has_qkv_bias(config: ModelConfig) -> bool:
    """Queries, keys and values have biases."""
    return config.qkv_bias


def has_mlp_bias(config: ModelConfig) -> bool:
    """The MLP's projections have biases."""
    return config.mlp_bias


def is_square(config: ModelConfig) -> bool:
    """Query and output projections are square: no shape check sees a transposition."""
    return config.num_attention_heads * config.head_dim == config.hidden_size


def is_grouped(config: ModelConfig) -> bool:
    """Several query heads read one of several key heads."""
    return 1 < config.num_key_value_heads < config.num_attention_heads


# -- What many plants do ---------------------------------------------------------------


def with_parameters(candidate: Candidate, parameters: Mapping[str, Any]) -> Candidate:
    """Other values for some parameters."""
    return replace(candidate, stored={**candidate.stored, **parameters})


def instead(functions: Mapping[str, OpFunction]) -> Plant:
    """Other functions for some ops, by tap or by function."""
    return lambda candidate: replace(candidate, replace={**candidate.replace, **functions})


def misread(**fields: Any) -> Plant:
    """Another value of a config field, as a wrong translation of config.json gives it."""
    return lambda candidate: replace(candidate, config=replace(candidate.config, **fields))
