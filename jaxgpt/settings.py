"""What a run may be told: dataclasses from which flags, config files and help are made.

Framework-free. A flag exists because a field here does; its help is the field's
docstring. `jaxgpt.options` builds parsers and reads config files from these.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxgpt.errors import InputError
from jaxgpt.generation_settings import GenerationSettings
from jaxgpt.parallel_settings import MeshSettings, ProcessSettings

Device = Literal["auto", "cpu", "gpu"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]

SMALLEST, LARGEST = 1.2e-38, 3.4e38
"""Positive numbers that float32, which training computes in, does not round to zero or infinity."""


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
    """recompute activations in the backward pass: less memory, more time; XLA's CPU compiler undoes it"""
    device: Device = "auto"
    """a device that is asked for and missing is an error"""
    eval_every: int = 100
    """steps between validations; 0 for none but the first and last"""
    eval_batches: int = 20
    """batches of a validation; 0 for all that is held out"""
    patience: int = 0
    """validations without a better loss before stopping early; 0 never stops"""
    save_every: int = 200
    """steps between checkpoints; the last step is always saved"""
    keep: int = 2
    """checkpoints to keep, besides the best"""
    log_every: int = 10
    """steps between log lines"""
    loss_unit: Literal["nats", "bits"] = "nats"
    """unit of the losses that are printed; log files and JSON stay in nats"""
    sample_every: int = 0
    """steps between samples of the fixed prompt; 0 for none"""
    sample_prompt: str = "def "
    """the fixed prompt"""
    accept_loss: bool = False
    """go on although the data, a loaded model's first validation loss or its golden prompts look damaged"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "sequence_length", "epochs", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "eval_every", "eval_batches", "patience", "save_every", "sample_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be ≥ 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in 0–{2**32 - 1}, got {self.seed}")
        for name in ("learning_rate", "clip_norm"):
            if not SMALLEST <= getattr(self, name) <= LARGEST:
                raise InputError(f"{name} must be positive, and one that float32 holds, got {getattr(self, name)}")
        for name in ("decay_fraction", "final_learning_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 <= self.weight_decay <= LARGEST:
            raise InputError(f"weight_decay must be ≥ 0, and one that float32 holds, got {self.weight_decay}")
        if self.warmup_steps > max(self.steps, TrainSettings.warmup_steps):
            raise InputError(f"warmup_steps {self.warmup_steps} is more than the run's {self.steps} steps; lower it")
        if self.patience and not self.eval_every:
            raise InputError("patience counts validations, and eval_every 0 makes none; give --eval-every or drop it")


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
    dry_run: bool = False
    """say what the run would take (memory, time, first loss) and end; writes nothing but compiled programs"""
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    mesh: MeshSettings = field(default=MeshSettings())
    processes: ProcessSettings = field(default=ProcessSettings())


@dataclass(frozen=True)
class SFTSettings:
    """`jaxgpt sft`: teach a model to answer, from chat JSONL."""

    model: str = ""
    """checkpoint to start from"""
    data: str = ""
    """chat JSONL: {"messages": [...]} or {"prompt", "completion"} rows"""
    validation: str = ""
    """chat JSONL to validate on; unless given the last twentieth of --data, if it has 100 episodes"""
    out: str = ""
    """run folder: checkpoints and logs"""
    resume: bool = False
    """go on with the run in --out, bit for bit, with the settings it was started with"""
    dry_run: bool = False
    """say what the run would take (memory, time, first loss) and end; writes nothing but compiled programs"""
    template: Literal["", "chatml", "tags", "plain"] = ""
    """chat template; the checkpoint's own unless given"""
    pack: bool = True
    """several episodes in a row, without attention between them"""
    train: TrainSettings = TrainSettings(learning_rate=3e-4, weight_decay=0.0, epochs=1000, eval_every=50)
    mesh: MeshSettings = field(default=MeshSettings())
    processes: ProcessSettings = field(default=ProcessSettings())


# -- What verbs of the command line are told -------------------------------------------

_POSITIONAL: dict[str, Any] = {"metadata": {"positional": True}}


@dataclass(frozen=True)
class OutputSettings:
    """How any verb reports."""

    json: bool = False
    """results as JSON on stdout, one object a line; everything else goes to stderr"""
    debug: bool = False
    """print stop tokens, and where an error of input was found"""


@dataclass(frozen=True)
class GenerateSettings:
    """`jaxgpt generate`: continue texts or conversations."""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder"""
    prompts: tuple[str, ...] = field(default=(), **_POSITIONAL)
    """texts to continue; several are one batch"""
    messages: str = ""
    """conversations to answer: JSON (a list of messages) or chat JSONL"""
    ids: tuple[str, ...] = ()
    """a prompt as token ids, such as 464,2068 (repeatable); for models without a tokenizer too"""
    device: Device = "auto"
    """a device that is asked for and missing is an error"""
    compute_dtype: ComputeDtype | None = None
    """dtype of activations and cache; the checkpoint's unless given"""
    generation: GenerationSettings = field(default=GenerationSettings())


@dataclass(frozen=True)
class ChatSettings:
    """`jaxgpt chat`: talk with a checkpoint."""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder"""
    message: str | None = field(default=None, **_POSITIONAL)
    """one message to answer; a conversation unless given"""
    system: str = ""
    """system message that opens the conversation"""
    raw: bool = False
    """continue the text as it is, without a chat template"""
    chat: bool = False
    """use the chat template although the checkpoint is a base model"""
    greedy: bool = False
    """the most likely token, every time: temperature 0"""
    num_samples: int = 1
    """replies to one message, each with the next seed"""
    device: Device = "auto"
    """a device that is asked for and missing is an error"""
    compute_dtype: ComputeDtype | None = None
    """dtype of activations and cache; the checkpoint's unless given"""
    generation: GenerationSettings = field(default=GenerationSettings())

    def __post_init__(self) -> None:
        if self.raw and self.chat:
            raise InputError("--raw and --chat exclude each other; drop one")
        if self.raw and self.system:
            raise InputError("--system needs the chat template; drop --raw, or put the text into the message")
        if self.greedy and self.generation.temperature > 0:
            raise InputError(f"--greedy and --temperature {self.generation.temperature:g} contradict; drop one")
        if self.num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.num_samples > 1 and self.message is None:
            raise InputError("--num-samples needs a message to answer; give one after the folder")
        if self.num_samples > 1 and self.generation.temperature <= 0:
            raise InputError("--num-samples of a greedy reply are all the same; add --temperature 0.8")


@dataclass(frozen=True)
class CheckSettings:
    """`jaxgpt check`: is what trains what answers?"""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder"""
    all: bool = False
    """go on after the first failure"""
    memorize: bool | None = None
    """train on one batch until it is known by heart; by itself below 50 M parameters"""
    device: Device = "auto"
    """a device that is asked for and missing is an error"""


@dataclass(frozen=True)
class InspectSettings:
    """`jaxgpt inspect`: what a checkpoint, Hugging Face folder or file of tensors holds."""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder, Hugging Face folder, or one .pt, .bin, .safetensors or GGUF file"""
    tensors: bool = False
    """every tensor's shape, dtype, statistics and first elements; of a GGUF file shape and dtype"""


@dataclass(frozen=True)
class BenchSettings:
    """`jaxgpt bench`: how fast a checkpoint reads and writes."""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder"""
    iterations: int = 5
    """measured runs, after one that compiles"""
    max_tokens: int = 128
    """tokens to generate in each run"""
    floor: float | None = None
    """tokens/s of decoding below which the benchmark fails"""
    device: Device = "auto"
    """a device that is asked for and missing is an error"""
    compute_dtype: ComputeDtype | None = None
    """dtype of activations and cache; the checkpoint's unless given"""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"iterations must be at least 1, got {self.iterations}")
        if self.max_tokens < 2:
            raise InputError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.floor is not None and not 0.0 <= self.floor < float("inf"):
            raise InputError(f"floor must be ≥ 0 tokens/s, got {self.floor}")


@dataclass(frozen=True)
class ImportSettings:
    """`jaxgpt import`: a model of another program as a checkpoint."""

    source: str = field(**_POSITIONAL)
    """Hugging Face folder (safetensors or pytorch_model.bin), or a .pt file such as nanoGPT's"""
    directory: str = field(**_POSITIONAL)
    """checkpoint folder to write"""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """dtype of the weights; keep is the file's"""
    set: tuple[str, ...] = ()
    """KEY=VALUE that replaces a setting of the source, such as n_head=12; may be repeated"""
    verify: bool = False
    """read every value back and compare it with the source, bit for bit"""


@dataclass(frozen=True)
class ExportSettings:
    """`jaxgpt export`: a checkpoint for other programs."""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder"""
    out: str = field(**_POSITIONAL)
    """folder to write; a file for gguf"""
    format: Literal["hf", "gguf"] = "hf"
    """hf is a Hugging Face folder: config.json and safetensors; gguf is llama.cpp's one file"""
    dtype: Literal["keep", "float32", "float16", "bfloat16", "q8_0"] = "keep"
    """dtype of the weights; keep is the checkpoint's, q8_0 (8 bits and a scale for 32 values) is for gguf only"""

    def __post_init__(self) -> None:
        if self.dtype == "q8_0" and self.format != "gguf":
            raise InputError("--dtype q8_0 needs --format gguf")


@dataclass(frozen=True)
class DataEncodeSettings:
    """`jaxgpt data encode`: text to token shards."""

    sources: tuple[str, ...] = field(default=("stdlib",), **_POSITIONAL)
    """folders, text or .jsonl files; stdlib is the Python standard library's source"""
    out: str = ""
    """folder to write"""
    tokenizer: str = "gpt2"
    """gpt2, char (learns its characters from the sources), or the path of a tokenizer.json, of a folder with one or
    with vocab.json and merges.txt, or of a checkpoint, as with --model"""
    tokenizer_kind: Literal["auto", "hf", "bpe", "hex"] = "auto"
    """read that path as this kind of vocabulary, whatever it looks like; auto tells it by content"""
    template: Literal["chatml", "tags", "plain"] = "chatml"
    """chat template whose special tokens get ids, so that SFT can follow"""
    model: str = ""
    """checkpoint whose tokenizer and template to use instead"""
    val_fraction: float = 0.05
    """share of the documents that is held out"""
    shard_tokens: int = 10_000_000
    """tokens of a shard"""
    workers: int | None = None
    """threads; one a core unless given"""
    accept: bool = False
    """go on although the first documents look broken"""


@dataclass(frozen=True)
class DataInspectSettings:
    """`jaxgpt data inspect`: what SFT would train on."""

    file: str = field(**_POSITIONAL)
    """chat JSONL"""
    model: str = ""
    """checkpoint whose tokenizer and template to use"""
    tokenizer: str = "gpt2"
    """where no checkpoint is given: gpt2, char (learns its characters from the file), or a path, as of data encode"""
    tokenizer_kind: Literal["auto", "hf", "bpe", "hex"] = "auto"
    """read that path as this kind of vocabulary, whatever it looks like; auto tells it by content"""
    template: Literal["", "chatml", "tags", "plain"] = ""
    """chat template; the checkpoint's own, or chatml, unless given"""
    sequence_length: int = 1024
    """T: longer episodes are dropped in SFT"""
    episodes: int = 3
    """episodes to show"""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise InputError(f"sequence_length must be at least 1, got {self.sequence_length}")
        if self.episodes < 0:
            raise InputError(f"episodes must be ≥ 0, got {self.episodes}")


@dataclass(frozen=True)
class HubDownloadSettings:
    """`jaxgpt hub download`: models of the Hugging Face hub as folders."""

    names: tuple[str, ...] = field(**_POSITIONAL)
    """models, such as openai-community/gpt2; with --all users or organisations"""
    out: str = ""
    """folder to write: of one model its own, of several the folder of their folders; by default the model's name"""
    revision: str = ""
    """branch, tag or commit; the main branch unless given"""
    all: bool = False
    """every model of the users or organisations named"""
    list: bool = False
    """only say which files would be fetched"""
    include: tuple[str, ...] = ()
    """files to fetch beside safetensors, config and tokenizer, such as pytorch_model.bin or *.gguf; repeatable"""
    steps: Literal["newest", "all"] = "newest"
    """of a checkpoint of jaxgpt, the newest step or every one"""


@dataclass(frozen=True)
class HubUploadSettings:
    """`jaxgpt hub upload`: a folder as a model of the Hugging Face hub."""

    directory: str = field(**_POSITIONAL)
    """run folder, a step of it, or a Hugging Face folder; with --all a folder of such folders"""
    name: str = field(**_POSITIONAL)
    """OWNER/MODEL on the hub; with --all the owner"""
    steps: Literal["newest", "best", "all"] = "newest"
    """of a run folder, the newest step, the best by validation, or every one"""
    train: bool = False
    """send the state to resume training from, too; about twice the size of the weights"""
    public: bool = False
    """make a new model visible to everybody; private unless given"""
    revision: str = ""
    """branch to write to, made where there is none; the main branch unless given"""
    message: str = ""
    """of the commit"""
    all: bool = False
    """every model folder in DIRECTORY, as NAME/folder"""
    list: bool = False
    """only say which files would be sent"""


@dataclass(frozen=True)
class HubListSettings:
    """`jaxgpt hub list`: what a user or organisation has on the Hugging Face hub."""

    groups: tuple[str, ...] = field(**_POSITIONAL)
    """users or organisations, such as openai-community"""


@dataclass(frozen=True)
class TokenizerAddSettings:
    """`jaxgpt tokenizer add`: a checkpoint with more tokens of content."""

    directory: str = field(**_POSITIONAL)
    """checkpoint folder"""
    out: str = field(**_POSITIONAL)
    """checkpoint folder to write"""
    token: tuple[str, ...] = ()
    """a token to add, such as <MUL_2_3_6> (repeatable)"""
    tokens: str = ""
    """file with one token to add on each line"""


@dataclass(frozen=True)
class TokenizerRepairSettings:
    """`jaxgpt tokenizer repair`: put right what was saved wrongly of a tokenizer."""

    directory: str = field(**_POSITIONAL)
    """run folder, or one step's folder"""
    adopt: bool = False
    """take ids over that are only guessed, after you compared them with what the model was trained with"""
    token: tuple[str, ...] = ()
    """a special token that is content, whatever it looks like (repeatable)"""
