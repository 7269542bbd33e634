"""What a run may be told: dataclasses from which flags, config files and help are made.

Framework-free. A flag exists because a field here does; its help is the field's
docstring. `jaxgpt.options` builds parsers and reads config files from these.
"""

from dataclasses import dataclass
from typing import Literal

from jaxgpt.errors import InputError

Device = Literal["auto", "cpu", "gpu"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class GenerationSettings:
    """How ids are drawn from logits, and when to stop."""

    max_new_tokens: int = 128
    """most tokens to generate"""
    temperature: float = 0.0
    """0 is greedy: the most likely token, every time"""
    top_k: int = 0
    """sample from the k most likely tokens; 0 for all"""
    top_p: float = 1.0
    """sample from the most likely tokens that together reach this probability"""
    seed: int = 0
    """the same seed gives the same text"""
    stop: tuple[str, ...] = ()
    """stop when this text appears (repeatable); it is not printed"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be ≥ 0, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be ≥ 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in 0–{2**32 - 1}, got {self.seed}")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty; give the text to stop at")


@dataclass(frozen=True)
class TrainSettings:
    """One training loop's settings, the same for pretraining and SFT."""

    steps: int = 1000
    """optimizer steps"""
    batch_size: int = 16
    """rows of a micro-batch"""
    accumulate: int = 1
    """micro-batches per optimizer step; the update equals that of one large batch"""
    sequence_length: int = 256
    """tokens of a row"""
    epochs: int = 1
    """passes over the data that are allowed; training stops when they are used up"""
    learning_rate: float = 1e-3
    """peak learning rate"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """after warm-up: cosine decay, warmup-stable-decay, or constant"""
    warmup_steps: int = 50
    """steps of linear warm-up"""
    decay_fraction: float = 0.2
    """share of the steps over which wsd decays"""
    final_learning_rate: float = 0.1
    """learning rate at the end, as a share of the peak"""
    weight_decay: float = 0.1
    """decoupled decay of matrices; norms and biases have none"""
    beta1: float = 0.9
    """AdamW's first moment"""
    beta2: float = 0.95
    """AdamW's second moment"""
    clip_norm: float = 1.0
    """largest global norm of a gradient"""
    seed: int = 0
    """of fresh weights, dropout and data order"""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of activations; auto is bfloat16 on a GPU, float32 on a CPU; weights stay float32"""
    remat: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    device: Device = "auto"
    """a device that is asked for and missing is an error"""
    eval_every: int = 100
    """steps between validations; 0 for none but the first and last"""
    eval_batches: int = 20
    """batches of a validation"""
    patience: int = 0
    """validations without a better loss before stopping early; 0 never stops"""
    save_every: int = 200
    """steps between checkpoints; the last step is always saved"""
    keep: int = 2
    """checkpoints to keep, besides the best"""
    log_every: int = 10
    """steps between log lines"""
    sample_every: int = 0
    """steps between samples of the fixed prompt; 0 for none"""
    sample_prompt: str = "def "
    """the fixed prompt"""
    accept_loss: bool = False
    """go on although a loaded model's first validation loss looks like damaged weights"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "sequence_length", "epochs", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "eval_every", "eval_batches", "patience", "save_every", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be ≥ 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("decay_fraction", "final_learning_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay must be ≥ 0, got {self.weight_decay}")


@dataclass(frozen=True)
class ModelSettings:
    """Shape of a fresh model: a preset and what differs from it."""

    preset: Literal["tiny", "llama-tiny", "gpt2", "qwen2-0.5b", "llama3-8b"] = "tiny"
    """the model to start from"""
    hidden_size: int | None = None
    """width of the residual stream"""
    intermediate_size: int | None = None
    """width of the MLP"""
    num_hidden_layers: int | None = None
    """layers"""
    num_attention_heads: int | None = None
    """query heads"""
    num_key_value_heads: int | None = None
    """key/value heads"""
    head_dim: int | None = None
    """width of a head; hidden size / heads unless given"""
    max_position_embeddings: int | None = None
    """context limit in tokens"""
    dropout: float = 0.0
    """of embedding, attention and residual branches"""


@dataclass(frozen=True)
class PretrainSettings:
    """`jaxgpt pretrain`: a base model from token shards."""

    data: str = ""
    """folder written by `jaxgpt data encode`"""
    out: str = ""
    """run folder: checkpoints and logs"""
    init_from: str = ""
    """checkpoint to start from; a fresh model unless given"""
    resume: bool = False
    """go on with the run in --out, bit for bit, with the settings it was started with"""
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()


@dataclass(frozen=True)
class SFTSettings:
    """`jaxgpt sft`: teach a model to answer, from chat JSONL."""

    model: str = ""
    """checkpoint to start from"""
    data: str = ""
    """chat JSONL: {"messages": [...]} or {"prompt", "completion"} rows"""
    validation: str = ""
    """chat JSONL to validate on; the last rows of --data unless given"""
    out: str = ""
    """run folder: checkpoints and logs"""
    resume: bool = False
    """go on with the run in --out, bit for bit, with the settings it was started with"""
    template: Literal["", "chatml", "tags", "plain"] = ""
    """chat template; the checkpoint's own unless given"""
    pack: bool = True
    """several episodes in a row, without attention between them"""
    train: TrainSettings = TrainSettings(learning_rate=3e-4, weight_decay=0.0, epochs=1000, eval_every=50)
