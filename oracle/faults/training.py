"""Wrong training: batches, loss, accumulation and the optimizer.

They must show in the rungs loss, gradients and optimizer.

The optimizer is AdamW written out, with every rule a field, so that a mistake is
one changed rule; without a mistake it is the product's to rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import loss, model, train_step
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch
from jaxgpt.optimizer import schedule
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle import training
from oracle.candidate import Candidate
from oracle.faults.fault import Plant
from oracle.training_probe import SETTINGS, Corpus

Array = Any
Gradients = dict[str, Array]
TokenLosses = Callable[[ModelConfig, model.Params, Any, str], Array]


def trained(**fields: Any) -> Plant:
    """Other fields of how the candidate trains."""
    return lambda candidate: replace(candidate, training=replace(candidate.training, **fields))


def told(**fields: Any) -> Plant:
    """Settings misread."""
    return trained(settings=replace(SETTINGS, **fields))


# -- Batches ---------------------------------------------------------------------------


def packed(change: Callable[[Batch], dict[str, np.ndarray]]) -> Plant:
    """Arrays of each batch changed after it was packed."""
    return trained(batches=_packed(change))


@cache
def _packed(change: Callable[[Batch], dict[str, np.ndarray]]) -> training.Packer:
    def batches(corpus: Corpus, settings: TrainSettings) -> Sequence[Batch]:
        wrong: Any = [{**batch, **change(batch)} for batch in training.batches(corpus, settings)]
        return wrong

    return batches


def _next(array: np.ndarray) -> np.ndarray:
    """Each place takes what its right neighbour has; the last gets 0."""
    return np.pad(array[:, 1:], ((0, 0), (0, 1)))


def label_not_shifted(batch: Batch) -> dict[str, np.ndarray]:
    """A token predicts itself."""
    return {"targets": batch["ids"]}


def label_shifted_twice(batch: Batch) -> dict[str, np.ndarray]:
    """A token predicts the one after the next."""
    return {"targets": _next(batch["targets"])}


def mask_shifted(batch: Batch) -> dict[str, np.ndarray]:
    """The mask is that of the ids, not of the targets: one place too far right."""
    return {"mask": np.pad(batch["mask"][:, :-1], ((0, 0), (1, 0)))}


def padding_trained(batch: Batch) -> dict[str, np.ndarray]:
    """Places without a token count."""
    return {"mask": np.where(batch["segments"] == 0, np.float32(1), batch["mask"])}


def everything_trained(batch: Batch) -> dict[str, np.ndarray]:
    """Prompts are trained like replies."""
    same = (batch["segments"] > 0) & (_next(batch["segments"]) == batch["segments"])
    return {"targets": np.where(same, _next(batch["ids"]), batch["targets"]), "mask": _or(batch["mask"], same)}


def across_documents(batch: Batch) -> dict[str, np.ndarray]:
    """The last token of a document predicts the first of the next."""
    following = _next(batch["segments"])
    ends = (following != batch["segments"]) & (following > 0) & (batch["mask"] == 0)
    return {"targets": np.where(ends, _next(batch["ids"]), batch["targets"]), "mask": _or(batch["mask"], ends)}


def _or(mask: np.ndarray, also: np.ndarray) -> np.ndarray:
    return np.maximum(mask, also.astype(np.float32))


def last_not_trained(batch: Batch) -> dict[str, np.ndarray]:
    """The last trained place of each reply is left out: its end is never learnt. Conversations begin untrained."""
    is_kept = (_next(batch["mask"]) > 0) | (batch["mask"][:, :1] > 0)
    return {"mask": batch["mask"] * is_kept}


def positions_run_on(batch: Batch) -> dict[str, np.ndarray]:
    """Positions do not restart at a document."""
    return {"positions": np.broadcast_to(np.arange(batch["ids"].shape[1], dtype=np.int32), batch["ids"].shape)}


def one_segment(batch: Batch) -> dict[str, np.ndarray]:
    """Documents of a row are not told apart."""
    return {"segments": (batch["segments"] > 0).astype(np.int32)}


# -- Loss and accumulation -------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """From a batch to a mean loss and a gradient."""

    tokens: Callable[[Array, Array], Array] = loss.token_losses
    """Logits and targets to losses."""
    dropout: bool = False
    """Dropout stays on where it should be off."""
    divisor: Callable[[Any, Any], Array] = lambda batch, batches: batches["mask"].sum()
    """What a micro-batch's sum is divided by: the micro-batch, then all of the step."""
    total: Callable[[Array, Array], Array] = lambda so_far, new: so_far + new
    """How micro-batches' gradients are added up."""
    gradient: Callable[[ModelConfig, Gradients, Any], Gradients] = lambda config, gradients, batches: gradients
    """What becomes of the gradient in the end."""


def learning(recipe: Recipe) -> Plant:
    """Losses, gradients and steps of a wrong recipe; the loss of a token only where that is wrong."""

    def plant(candidate: Candidate) -> Candidate:
        fields: dict[str, Any] = {"gradients": gradients(recipe), "step": stepping(Rules(), recipe)}
        if recipe.tokens is not loss.token_losses or recipe.dropout:
            fields["losses"] = losses(recipe)
        return trained(**fields)(candidate)

    return plant


@cache
def losses(recipe: Recipe) -> training.Losses:
    """Per-token losses (B, T)."""

    @partial(jax.jit, static_argnums=(0, 3))
    def of(config: ModelConfig, params: model.Params, batch: Any, dtype: str) -> Array:
        return _token_losses(recipe, config, params, batch, dtype, jax.random.key(7) if recipe.dropout else None)

    return of


def _token_losses(recipe: Recipe, config: ModelConfig, params: Any, batch: Any, dtype: str, rng: Any) -> Array:
    given = {"positions": batch["positions"], "segments": batch["segments"], "rng": rng}
    output = model.forward(config, model.cast(params, dtype), batch["ids"], **given)
    return recipe.tokens(output.logits, batch["targets"])


@cache
def gradients(recipe: Recipe) -> training.Gradients:
    """Mean loss and its gradient over micro-batches (A, B, T)."""
    return jax.jit(partial(_mean_gradients, recipe), static_argnums=(0, 1, 2))


def _mean_gradients(
    recipe: Recipe, config: ModelConfig, settings: TrainSettings, dtype: str, state: TrainState, batches: Any
) -> tuple[Array, Gradients]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def micro(params: model.Params, batch: Any) -> Array:
        each = _token_losses(recipe, config, params, batch, dtype, key)
        return jnp.where(batch["mask"] > 0, each, 0.0).sum() / recipe.divisor(batch, batches)

    def add(so_far: tuple[Array, Gradients], batch: Any) -> tuple[tuple[Array, Gradients], None]:
        value, found = jax.value_and_grad(micro)(state.params, batch)
        return (so_far[0] + value, {name: recipe.total(so_far[1][name], found[name]) for name in found}), None

    start = jnp.float32(0), {name: jnp.zeros_like(array) for name, array in state.params.items()}
    (mean, total), _ = jax.lax.scan(add, start, batches)
    return mean, recipe.gradient(config, total, batches)


def losses_in_bfloat16(logits: Array, targets: Array) -> Array:
    """log-softmax in bfloat16."""
    each = jax.nn.log_softmax(logits.astype(jnp.bfloat16), axis=-1)
    return -jnp.take_along_axis(each, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)


def smoothed(logits: Array, targets: Array) -> Array:
    """A tenth of the weight spread over the vocabulary (Szegedy et al. 2016)."""
    each = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(each, targets[..., None], axis=-1)[..., 0]
    return -0.9 * chosen - 0.1 * each.mean(-1)


def shifted_again(logits: Array, targets: Array) -> Array:
    """The loss shifts targets that were shifted before (transformers #47394)."""
    each = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(each, targets[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(-chosen, ((0, 0), (0, 1)))


def in_bits(logits: Array, targets: Array) -> Array:
    """Logarithms to base 2."""
    return loss.token_losses(logits, targets) / math.log(2)


def with_z_loss(logits: Array, targets: Array) -> Array:
    """PaLM's auxiliary loss, which is to be added in training only."""
    z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return z - chosen + 1e-3 * jnp.square(z)


def mean_of_means(batch: Any, batches: Any) -> Array:
    """Each micro-batch is averaged by itself (transformers #34191)."""
    return jnp.maximum(batch["mask"].sum(), 1) * batches["ids"].shape[0]


def sum_of_means(batch: Any, batches: Any) -> Array:
    """The micro-batches' means are added up."""
    return jnp.maximum(batch["mask"].sum(), 1)


def over_all_places(batch: Any, batches: Any) -> Array:
    """Untrained places count in the mean."""
    return jnp.float32(batches["mask"].size)


def last_only(so_far: Array, new: Array) -> Array:
    """A micro-batch's gradient replaces those before it."""
    return new


def in_bfloat16(so_far: Array, new: Array) -> Array:
    """Gradients are added up in bfloat16: casts to it and back would be optimized away."""
    return jax.lax.reduce_precision(so_far + jax.lax.reduce_precision(new, 8, 7), 8, 7)


def divided_again(config: ModelConfig, found: Gradients, batches: Any) -> Gradients:
    """Divided by the number of micro-batches a second time."""
    return {name: array / batches["ids"].shape[0] for name, array in found.items()}


def key_bias_frozen(config: ModelConfig, found: Gradients, batches: Any) -> Gradients:
    """The key's bias gets no gradient."""
    return {name: array * (0 if name.endswith("attn.k.bias") else 1) for name, array in found.items()}


def embedding_frozen(config: ModelConfig, found: Gradients, batches: Any) -> Gradients:
    """The embedding gets no gradient."""
    return {name: array * (0 if name == "embed.tokens.weight" else 1) for name, array in found.items()}


def norms_frozen(config: ModelConfig, found: Gradients, batches: Any) -> Gradients:
    """Norms get no gradient."""
    return {name: array * (0 if "norm" in name else 1) for name, array in found.items()}


# -- Optimizer -------------------------------------------------------------------------


def clipped_by_norm(found: Gradients, limit: float) -> Gradients:
    """By the norm of all gradients together: right."""
    norm = optax.tree.norm(found)
    return {name: array * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30)) for name, array in found.items()}


def not_clipped(found: Gradients, limit: float) -> Gradients:
    """Not at all."""
    return found


def clipped_one_by_one(found: Gradients, limit: float) -> Gradients:
    """Each tensor by its own norm."""
    return {name: clipped_by_norm({name: array}, limit)[name] for name, array in found.items()}


def clipped_by_value(found: Gradients, limit: float) -> Gradients:
    """Each number by itself, at a hundredth."""
    return {name: jnp.clip(array, -limit / 100, limit / 100) for name, array in found.items()}


def matrices_decay(name: str, array: Array) -> bool:
    """Norms and biases do not: right."""
    return array.ndim > 1


def all_decay(name: str, array: Array) -> bool:
    """Norms and biases decay, too."""
    return True


def none_decays(name: str, array: Array) -> bool:
    """Nothing does."""
    return False


def all_but_embeddings_decay(name: str, array: Array) -> bool:
    """The embeddings are left out, as in minGPT."""
    return array.ndim > 1 and not name.startswith("embed.")


def one_later(settings: TrainSettings) -> Callable[[Array], Array]:
    """Steps counted from 1."""
    return lambda step: schedule(settings)(step + 1)


def linear(settings: TrainSettings) -> Callable[[Array], Array]:
    """Linear decay where cosine was asked for."""
    last = settings.steps - 1
    peak, final = settings.learning_rate, settings.learning_rate * settings.final_learning_rate

    def rate(step: Array) -> Array:
        done = jnp.clip((step - settings.warmup_steps) / (last - settings.warmup_steps), 0, 1)
        return jnp.minimum(1.0, (step + 1) / (settings.warmup_steps + 1)) * (peak + (final - peak) * done)

    return rate


def to_zero(settings: TrainSettings) -> Callable[[Array], Array]:
    """Decays to nothing: the final rate is ignored."""
    return schedule(replace(settings, final_learning_rate=0.0))


@dataclass(frozen=True)
class Rules:
    """AdamW (Loshchilov & Hutter 2019); the defaults are right."""

    rate: Callable[[TrainSettings], Callable[[Array], Array]] = schedule
    clip: Callable[[Gradients, float], Gradients] = clipped_by_norm
    decays: Callable[[str, Array], bool] = matrices_decay
    is_coupled: bool = False
    """Decay is added to the gradient, and so divided by Adam (L2 instead of decoupled)."""
    is_scaled: bool = True
    """Decay is multiplied by the learning rate."""
    is_corrected: bool = True
    """Moments are corrected for their start at zero."""
    epsilon: float = 1e-8
    root_of_moment: bool = True
    """The second moment's root is divided by, not the moment."""
    keeps_moments: bool = True
    master: Any = jnp.float32
    """Dtype in which parameters are kept between steps."""


def optimized(rules: Rules) -> Plant:
    """Steps by other rules."""
    return trained(step=stepping(rules, Recipe()))


@cache
def stepping(rules: Rules, recipe: Recipe) -> training.Step:
    """A training step by rules and a recipe."""
    return jax.jit(partial(_step, rules, recipe), static_argnums=(0, 1, 2))


def _step(
    rules: Rules,
    recipe: Recipe,
    config: ModelConfig,
    settings: TrainSettings,
    dtype: str,
    state: TrainState,
    batches: Any,
) -> tuple[TrainState, StepReport]:
    if recipe == Recipe():
        mean, found = train_step.mean_gradients(config, settings, dtype, state, batches)
    else:
        mean, found = _mean_gradients(recipe, config, settings, dtype, state, batches)
    norm = optax.tree.norm(found)
    moments = _adam(state.moments)
    rate = rules.rate(settings)(moments.count)
    params, moments = _updated(rules, settings, state.params, rules.clip(found, settings.clip_norm), moments, rate)
    after = TrainState(params, _with_adam(state.moments, moments), state.step + 1, state.rng)
    return after, StepReport(mean, norm, jnp.asarray(rate, jnp.float32), jnp.bool_(True))


def _updated(
    rules: Rules, settings: TrainSettings, params: Any, found: Gradients, moments: Any, rate: Array
) -> tuple[dict[str, Array], Any]:
    b1, b2 = settings.beta1, settings.beta2
    decay = {name: settings.weight_decay * rules.decays(name, array) for name, array in params.items()}
    if rules.is_coupled:
        found = {name: array + decay[name] * params[name] for name, array in found.items()}
    keep = 1.0 if rules.keeps_moments else 0.0
    mu = {name: b1 * keep * moments.mu[name] + (1 - b1) * array for name, array in found.items()}
    nu = {name: b2 * keep * moments.nu[name] + (1 - b2) * jnp.square(array) for name, array in found.items()}
    count = moments.count + 1
    first, second = (1 - b1**count, 1 - b2**count) if rules.is_corrected else (1.0, 1.0)
    new: dict[str, Array] = {}
    for name, array in params.items():
        root = jnp.sqrt(nu[name] / second) if rules.root_of_moment else nu[name] / second
        move = rate * (mu[name] / first) / (root + rules.epsilon)
        shrink = 0.0 if rules.is_coupled else decay[name] * (rate if rules.is_scaled else settings.learning_rate)
        new[name] = (array - move - shrink * array).astype(rules.master).astype(array.dtype)
    return new, moments._replace(count=count, mu=mu, nu=nu)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _adam(moments: Any) -> Any:
    return next(node for node in jax.tree.leaves(moments, is_leaf=_is_adam) if _is_adam(node))


def _with_adam(moments: Any, adam: Any) -> Any:
    return jax.tree.map(lambda node: adam if _is_adam(node) else node, moments, is_leaf=_is_adam)
