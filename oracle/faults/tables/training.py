"""Rows: wrong training. Batches, loss and accumulation, gradients, optimizer."""

from dataclasses import replace

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from oracle.faults import training as t
from oracle.faults.fault import Fault, at, has_qkv_bias, has_rope
from oracle.faults.training import Recipe, Rules

LOSS, GRADIENTS, OPTIMIZER = "loss", "gradients", "optimizer"
TOKENS, MEAN, RATE, FIRST = "loss.tokens", "loss.mean", "learning_rate", "embed.tokens.weight"


def _last_parameter(config: ModelConfig) -> str:
    """Gradients are compared from the head back."""
    return weights.parameters(config)[-1].name


def _final_norm(config: ModelConfig) -> str:
    return [p.name for p in weights.parameters(config) if p.name.startswith("final_norm.")][-1]


def _last_key_bias(config: ModelConfig) -> str:
    return f"layers.{config.num_hidden_layers - 1}.attn.k.bias"


def _zero_gradient(config: ModelConfig, _dtype: str) -> str:
    if has_rope(config):
        return ""
    return "without RoPE a key's bias adds the same to every score of a query: its gradient is zero"


BATCHES = (
    Fault("label shift missing", "targets are not shifted", t.packed(t.label_not_shifted), LOSS, at("batch.targets")),
    Fault(
        "label shift doubled", "targets are shifted twice", t.packed(t.label_shifted_twice), LOSS, at("batch.targets")
    ),
    Fault("loss mask off by one", "the loss mask is off by one", t.packed(t.mask_shifted), LOSS, at("batch.mask")),
    Fault("padding trained", "padding is trained", t.packed(t.padding_trained), LOSS, at("batch.mask")),
    Fault("prompts trained", "prompts are trained", t.packed(t.everything_trained), LOSS, at("batch.mask")),
    Fault(
        "trained across documents",
        "the last token of a document predicts the next document",
        t.packed(t.across_documents),
        LOSS,
        at("batch.mask"),
    ),
    Fault(
        "end of a reply not trained",
        "the last token of a reply is not trained",
        t.packed(t.last_not_trained),
        LOSS,
        at("batch.mask"),
    ),
    Fault(
        "positions run on",
        "positions do not restart in a packed row",
        t.packed(t.positions_run_on),
        LOSS,
        at("batch.positions"),
    ),
    Fault(
        "segments lost",
        "packed documents are not told apart",
        t.packed(t.one_segment),
        LOSS,
        at("batch.segments"),
    ),
)

LOSSES = (
    Fault(
        "label shift doubled",
        "targets are shifted twice",
        t.learning(Recipe(tokens=t.shifted_again)),
        LOSS,
        at(TOKENS),
        place="in the loss",
    ),
    Fault(
        "loss in low precision",
        "the loss is computed in bfloat16",
        t.learning(Recipe(tokens=t.losses_in_bfloat16)),
        LOSS,
        at(TOKENS),
    ),
    Fault("label smoothing", "labels are smoothed", t.learning(Recipe(tokens=t.smoothed)), LOSS, at(TOKENS)),
    Fault("loss in bits", "the loss is in bits", t.learning(Recipe(tokens=t.in_bits)), LOSS, at(TOKENS)),
    Fault("auxiliary loss", "an auxiliary loss is added", t.learning(Recipe(tokens=t.with_z_loss)), LOSS, at(TOKENS)),
    Fault("dropout left on", "dropout is on", t.learning(Recipe(dropout=True)), LOSS, at(TOKENS)),
    Fault(
        "accumulation normalised per micro-batch",
        "each micro-batch is averaged by itself",
        t.learning(Recipe(divisor=t.mean_of_means)),
        LOSS,
        at(MEAN),
    ),
    Fault(
        "accumulation summed",
        "the means of micro-batches are added up",
        t.learning(Recipe(divisor=t.sum_of_means)),
        LOSS,
        at(MEAN),
    ),
    Fault(
        "mean over all places",
        "the loss is divided by all places, trained or not",
        t.learning(Recipe(divisor=t.over_all_places)),
        LOSS,
        at(MEAN),
    ),
)

BACKWARD = (
    Fault(
        "accumulation overwritten",
        "only the last micro-batch's gradient is used",
        t.learning(Recipe(total=t.last_only)),
        GRADIENTS,
        _last_parameter,
    ),
    Fault(
        "accumulation in bfloat16",
        "gradients are added up in bfloat16",
        t.learning(Recipe(total=t.in_bfloat16)),
        GRADIENTS,
        _last_parameter,
    ),
    Fault(
        "gradient scaled",
        "the gradient is divided by the number of micro-batches twice",
        t.learning(Recipe(gradient=t.divided_again)),
        GRADIENTS,
        _last_parameter,
    ),
    Fault(
        "parameter not trained",
        "the embedding gets no gradient",
        t.learning(Recipe(gradient=t.embedding_frozen)),
        GRADIENTS,
        at(FIRST),
        place="embedding",
    ),
    Fault(
        "parameter not trained",
        "norms get no gradient",
        t.learning(Recipe(gradient=t.norms_frozen)),
        GRADIENTS,
        _final_norm,
        place="norms",
    ),
    Fault(
        "parameter not trained",
        "the key's bias gets no gradient",
        t.learning(Recipe(gradient=t.key_bias_frozen)),
        GRADIENTS,
        _last_key_bias,
        has_qkv_bias,
        place="key bias",
        equivalent=_zero_gradient,
    ),
)

STEPS = (
    Fault(
        "learning-rate schedule off by one",
        "the schedule is one step ahead",
        t.optimized(Rules(rate=t.one_later)),
        OPTIMIZER,
        at(RATE),
    ),
    Fault("warm-up missing", "there is no warm-up", t.told(warmup_steps=0), OPTIMIZER, at(RATE)),
    Fault(
        "another schedule", "decay is linear", t.optimized(Rules(rate=t.linear)), OPTIMIZER, at(RATE), place="linear"
    ),
    Fault(
        "another schedule",
        "decay ends at zero",
        t.optimized(Rules(rate=t.to_zero)),
        OPTIMIZER,
        at(RATE),
        place="to zero",
    ),
    Fault(
        "schedule of micro-batches",
        "the schedule counts micro-batches as steps",
        t.told(steps=60),
        OPTIMIZER,
        at(RATE),
    ),
    Fault(
        "decay on norms and biases",
        "norms and biases decay",
        t.optimized(Rules(decays=t.all_decay)),
        OPTIMIZER,
        at("layers.0.attn_norm.weight"),
    ),
    Fault("no decay", "nothing decays", t.optimized(Rules(decays=t.none_decays)), OPTIMIZER, at(FIRST)),
    Fault(
        "no decay",
        "embeddings do not decay",
        t.optimized(Rules(decays=t.all_but_embeddings_decay)),
        OPTIMIZER,
        at(FIRST),
        place="of embeddings",
    ),
    Fault("coupled decay", "decay is added to the gradient", t.optimized(Rules(is_coupled=True)), OPTIMIZER, at(FIRST)),
    Fault(
        "decay not scheduled",
        "decay is multiplied by the peak rate",
        t.optimized(Rules(is_scaled=False)),
        OPTIMIZER,
        at(FIRST),
    ),
    Fault(
        "bias correction missing",
        "moments are not corrected",
        t.optimized(Rules(is_corrected=False)),
        OPTIMIZER,
        at(FIRST),
    ),
    Fault("Adam's betas", "beta2 is 0.999", t.told(beta2=0.999), OPTIMIZER, at(FIRST), place="second"),
    Fault("Adam's betas", "beta1 is 0.8", t.told(beta1=0.8), OPTIMIZER, at(FIRST), place="first"),
    Fault("Adam's epsilon", "Adam's epsilon is 1e-5", t.optimized(Rules(epsilon=1e-5)), OPTIMIZER, at(FIRST)),
    Fault(
        "moment without its root",
        "the second moment is not rooted",
        t.optimized(Rules(root_of_moment=False)),
        OPTIMIZER,
        at(FIRST),
    ),
    Fault(
        "moments not kept",
        "moments begin anew in every step",
        t.optimized(Rules(keeps_moments=False)),
        OPTIMIZER,
        at(FIRST),
    ),
    Fault("no clipping", "gradients are not clipped", t.optimized(Rules(clip=t.not_clipped)), OPTIMIZER, at(FIRST)),
    Fault(
        "clipping tensor by tensor",
        "each gradient is clipped by its own norm",
        t.optimized(Rules(clip=t.clipped_one_by_one)),
        OPTIMIZER,
        at(FIRST),
    ),
    Fault(
        "clipping by value",
        "gradients are clipped number by number",
        t.optimized(Rules(clip=t.clipped_by_value)),
        OPTIMIZER,
        at(FIRST),
    ),
    Fault(
        "master weights in bfloat16",
        "parameters are kept in bfloat16",
        t.optimized(Rules(master=t.jnp.bfloat16)),
        OPTIMIZER,
        at(FIRST),
    ),
)

# The rung computes in float32 whatever the model's dtype: a second one would show nothing else.
TRAINING = (*BATCHES, *LOSSES, *BACKWARD, *(replace(fault, dtypes=("float32",)) for fault in STEPS))
