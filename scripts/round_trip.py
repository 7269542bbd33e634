"""A Qwen2 goes Hugging Face → jaxgpt → SFT → Hugging Face and GGUF, and answers alike in all three programs.

transformers writes a random bfloat16 folder with a byte-level tokenizer.json and a ChatML
template; `jaxgpt import --verify` reads it, `jaxgpt sft` teaches it four conversations,
`jaxgpt export` writes both formats. Weights are trained in float32, exported as they are
(`--dtype keep`) and computed in float32 everywhere: what is compared is the same function.
The same conversations are then asked of jaxgpt, transformers and llama.cpp, greedily:
each renders its own template, tokenises with its own tokenizer and decodes by itself.

Tokens must be the same, but for certified ties: where two programs part, the margin
between the two best tokens is below twice the largest difference of log-odds seen
between them. Exit 1 where they differ otherwise.

    python scripts/round_trip.py                         # a tiny model
    python scripts/round_trip.py --preset qwen2-0.5b     # 494 M parameters: 11 GB of disk, 12 GiB of memory
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from tokenizer_agreement import QWEN2, trained


@dataclass(frozen=True)
class Preset:
    """A model, and what it takes to teach it in 20 steps."""

    sizes: dict[str, Any]
    scale: float
    """Standard deviation of fresh weights."""
    learning_rate: float


PRESETS = {
    "tiny": Preset(
        {
            "vocab_size": 8192,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
        },
        scale=0.05,
        learning_rate=6e-3,
    ),
    "qwen2-0.5b": Preset(
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "max_position_embeddings": 32768,
        },
        scale=0.02,
        learning_rate=1e-3,
    ),
}
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
EPISODES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is 2+3?"), ("assistant", "It is 5.")),
    (("system", "Be brief."), ("user", "def f(n):\n\treturn n"), ("assistant", "A function that returns n.")),
    (("user", "Naïve café, 日本 🙂?"), ("assistant", "Ça va, 日本!")),
    (("user", "Hi!"), ("assistant", "Hello."), ("user", "And then?"), ("assistant", "Then 1 < 2.")),
)
"""Roles and contents; the last reply of each is what is asked for."""
MAX_NEW = 24
TOP = 10
"""Most likely tokens whose log-probabilities llama.cpp tells."""
SEQUENCE = 64
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


@dataclass(frozen=True)
class Answer:
    """What one program made of one conversation."""

    prompt: list[int]
    ids: list[int]
    """Generated, the token that ended it included."""
    text: str
    """As a user of the program sees it."""


@dataclass(frozen=True)
class Answers:
    """What one program made of all conversations."""

    program: str
    each: list[Answer]
    away: float
    """Largest difference of its log-odds against the likeliest token from jaxgpt's, nats."""


# -- The folder ------------------------------------------------------------------------


def make_folder(preset: str, folder: Path) -> None:
    """A random bfloat16 Qwen2 with tokenizer and template, written by transformers and tokenizers."""
    import torch
    import transformers

    library = trained(QWEN2, nfc=True)
    end, pad = (library.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>"))
    config = transformers.Qwen2Config(
        **PRESETS[preset].sizes,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=PRESETS[preset].scale,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    texts = [content for episode in EPISODES for _, content in episode]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
        # A model knows which rows are no tokens. One that does not is worse than a guess, and SFT refuses it.
        states = [model.model(torch.tensor([library.encode(text).ids])).last_hidden_state[0] for text in texts]
        mean = torch.cat(states).float().mean(0)
        model.model.embed_tokens.weight[library.get_vocab_size() :] = -5 * mean / mean.square().sum()
    model.save_pretrained(folder)
    library.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))


def conversations() -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": content} for role, content in episode] for episode in EPISODES]


def asked() -> list[list[dict[str, str]]]:
    return [messages[:-1] for messages in conversations()]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), "utf-8")
    return path


# -- The programs ----------------------------------------------------------------------


def jaxgpt(*words: object) -> str:
    """Run the command as a user would, in a process of its own; what it wrote to stdout."""
    print(f"$ jaxgpt {' '.join(map(str, words))}", file=sys.stderr)
    command = [sys.executable, "-m", "jaxgpt", *map(str, words)]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"round_trip: jaxgpt {words[0]} ended with exit code {done.returncode}")
    print(f"  {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return done.stdout


def ask_jaxgpt(model: Path, folder: Path) -> list[Answer]:
    file = write_lines(folder / "asked.jsonl", asked())
    lines = jaxgpt("generate", model, "--messages", file, "--max-new-tokens", MAX_NEW, "--json").splitlines()
    return [Answer(row["prompt_ids"], row["ids"], row["text"]) for row in map(json.loads, lines)]


def ask_transformers(folder: Path) -> tuple[list[Answer], list[np.ndarray]]:
    """Answers, and log-probabilities (tokens, V) of each answer's tokens."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert model.dtype == torch.float32, model.dtype
    assert not any(loading.values()), loading
    answers: list[Answer] = []
    rows: list[np.ndarray] = []
    for messages in asked():
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        found = model.generate(
            **given, max_new_tokens=MAX_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        prompt = given["input_ids"][0].tolist()
        ids = found.sequences[0].tolist()[len(prompt) :]
        answers.append(Answer(prompt, ids, tokenizer.decode(ids, skip_special_tokens=True)))
        rows.append(torch.log_softmax(torch.cat(found.logits).double(), -1).numpy())
    return answers, rows


def ask_llama_cpp(file: Path, texts: Sequence[str]) -> tuple[list[Answer], list[list[dict[int, float]]]]:
    """Answers, and log-probabilities of the likeliest tokens at each of their steps, by id.

    Args:
        file: GGUF.
        texts: prompts as transformers renders them; llama.cpp's own must be the same.
    """
    requests: list[llama_cpp.Request] = []
    for messages, text in zip(asked(), texts, strict=True):
        greedy = {"temperature": 0, "top_k": 1, "cache_prompt": False}
        requests += [
            ("/apply-template", {"messages": messages}),
            ("/tokenize", {"content": text, "add_special": True, "parse_special": True}),
            ("/completion", {"prompt": text, "n_predict": MAX_NEW, "n_probs": TOP, "return_tokens": True, **greedy}),
            ("/v1/chat/completions", {"messages": messages, "max_tokens": MAX_NEW, **greedy}),
        ]
    replies = iter(llama_cpp.ask(file, *requests, context=2 * SEQUENCE, seconds=600))
    answers: list[Answer] = []
    rows: list[list[dict[int, float]]] = []
    for text in texts:
        rendered, tokenised, completed, chatted = (next(replies) for _ in range(4))
        assert rendered["prompt"] == text, f"llama.cpp renders {rendered['prompt']!r}, transformers {text!r}"
        said = chatted["choices"][0]["message"]["content"]
        answers.append(Answer(tokenised["tokens"], completed["tokens"], said))
        rows.append(told_by_llama_cpp(completed))
    return answers, rows


def told_by_llama_cpp(completed: Any) -> list[dict[int, float]]:
    """Log-probabilities by id at each step; none at the end and inside of characters, which it does not tell."""
    told: list[Any] = list(completed["completion_probabilities"])
    found: list[dict[int, float]] = []
    # From the end: it is the token that completes a character whose probabilities are told.
    for token in reversed(completed["tokens"]):
        known = bool(told) and told[-1]["id"] == token
        found.append({top["id"]: top["logprob"] for top in told.pop()["top_logprobs"]} if known else {})
    assert not told, f"llama.cpp tells probabilities of {told[-1]['id']}, which is not in its answer"
    return found[::-1]


def rendered_by_transformers(folder: Path) -> list[str]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in asked()]


# -- Comparison ------------------------------------------------------------------------


def log_probabilities(model: Path, answers: Sequence[Answer]) -> list[np.ndarray]:
    """jaxgpt's (tokens, V) at each of its answers' tokens."""
    from jaxgpt.loading import load

    loaded = load(str(model))
    found: list[np.ndarray] = []
    for answer in answers:
        logits = loaded.logits([answer.prompt + answer.ids[:-1]])[0, len(answer.prompt) - 1 :].astype(np.float64)
        found.append(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    return found


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def distance(ours: np.ndarray, theirs: Any, steps: int) -> float:
    """Largest difference of log-odds against the likeliest token, over the first steps.

    Odds, because llama.cpp sums the denominators of its probabilities in float32. It
    tells the likeliest tokens', and none where it ends; transformers tells all.
    """
    largest = 0.0
    for mine, row in zip(ours[:steps], theirs[:steps], strict=True):
        told = dict(enumerate(row)) if isinstance(row, np.ndarray) else row
        if told:
            ids, values = np.asarray(list(told)), np.asarray(list(told.values()))
            best = values.argmax()
            largest = max(largest, float(np.abs((mine[ids] - mine[ids[best]]) - (values - values[best])).max()))
    return largest


def compare(ours: Sequence[Answer], rows: Sequence[np.ndarray], name: str, each: list[Answer], theirs: Any) -> Answers:
    """Another program's answers, and how far its log-odds are where it has seen the same tokens."""
    # At the place where answers part, both still read the same tokens.
    steps = [min(common(a.ids, b.ids) + 1, len(a.ids), len(b.ids)) for a, b in zip(ours, each, strict=True)]
    away = max(distance(a, b, n) for a, b, n in zip(rows, theirs, steps, strict=True))
    return Answers(name, each, away)


def difference(ours: Answer, margins: np.ndarray, other: Answers, number: int) -> str:
    """What is not the same in another program's answer: empty, `tie`, or words."""
    theirs = other.each[number]
    if ours.prompt != theirs.prompt:
        return f"prompt {ours.prompt} is {theirs.prompt}"
    if ours.ids == theirs.ids:
        # The text is made of the same ids: it shows what each program's user is given.
        return "" if ours.text == theirs.text else f"text {ours.text!r} is {theirs.text!r}"
    at = common(ours.ids, theirs.ids)
    if at < min(len(ours.ids), len(theirs.ids)) and margins[at] < 2 * other.away:
        return "tie"
    return f"answer {ours.ids} is {theirs.ids}, margin {margins[min(at, len(margins) - 1)]:.3g}"


def margins_of(rows: np.ndarray) -> np.ndarray:
    """At each step, how far the likeliest token is before the next, in nats."""
    second, best = np.sort(rows, axis=-1)[:, -2:].T
    return best - second


# -- The trip --------------------------------------------------------------------------


def travel(preset: str, steps: int, folder: Path) -> float:
    """From a Hugging Face folder to `tuned`, `hf` and `model.gguf`; the last loss."""
    source, model, tuned = folder / "source", folder / "imported", folder / "tuned"
    folder.mkdir(parents=True, exist_ok=True)
    make_folder(preset, source)
    gc.collect()
    jaxgpt("import", source, model, "--verify")
    data = write_lines(folder / "chats.jsonl", conversations())
    run = {"steps": steps, "batch-size": 4, "sequence-length": SEQUENCE, "warmup-steps": 2, "log-every": 5}
    run |= {"learning-rate": PRESETS[preset].learning_rate, "eval-every": 0, "save-every": 0}
    # Random weights are hardly better than a guess, which is what the flag is for.
    flags = ["--accept-loss", *(word for flag, value in run.items() for word in (f"--{flag}", value))]
    taught = json.loads(jaxgpt("sft", "--model", model, "--data", data, "--out", tuned, *flags, "--json"))
    jaxgpt("export", tuned, folder / "hf", "--format", "hf")
    jaxgpt("export", tuned, folder / "model.gguf", "--format", "gguf")
    return taught["loss"]


def ask(folder: Path) -> dict[str, Any]:
    """What the three programs answer, and whether it is the same."""
    tuned, hf, file = folder / "tuned", folder / "hf", folder / "model.gguf"
    ours = ask_jaxgpt(tuned, folder)
    rows = log_probabilities(tuned, ours)
    stock, stock_rows = ask_transformers(hf)
    gc.collect()
    ggml, ggml_rows = ask_llama_cpp(file, rendered_by_transformers(hf))
    others = [
        compare(ours, rows, "transformers", stock, stock_rows),
        compare(ours, rows, "llama.cpp", ggml, ggml_rows),
    ]
    margins = [margins_of(row) for row in rows]
    told: list[dict[str, Any]] = [
        {
            "prompt": answer.prompt,
            "answer": answer.ids,
            "text": answer.text,
            "taught": messages[-1]["content"],
            "least_margin": float(margin.min()),
            "differences": {other.program: difference(answer, margin, other, n) for other in others},
        }
        for n, (answer, margin, messages) in enumerate(zip(ours, margins, conversations(), strict=True))
    ]
    different = [d for row in told for d in row["differences"].values() if d not in ("", "tie")]
    return {
        "conversations": told,
        "least_margin": min(row["least_margin"] for row in told),
        "log_odds_apart": {other.program: other.away for other in others},
        # On Linux in KiB; of this process and of the largest command.
        "peak_bytes": 1024 * max(resource.getrusage(who).ru_maxrss for who in WHO),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "transformers", "xllamacpp")},
        "same": not different,
    }


def table(found: dict[str, Any]) -> str:
    """The answers as Markdown, and the verdict."""
    lines = [
        "| conversation | prompt | answer | least margin, nats | transformers | llama.cpp |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, row in enumerate(found["conversations"], start=1):
        said = row["text"].replace("\n", "\\n").replace("|", "\\|")
        verdicts = [row["differences"][name] or "same ids" for name in ("transformers", "llama.cpp")]
        sizes = f"{len(row['prompt'])} ids | {said} ({len(row['answer'])} ids)"
        lines.append(f"| {number} | {sizes} | {row['least_margin']:.2f} | {' | '.join(verdicts)} |")
    apart = ", ".join(f"{name} {value:.1e}" for name, value in found["log_odds_apart"].items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        "",
        f"{'SAME' if found['same'] else 'DIFFERENT'}: {found['preset']} after {found['steps']} steps, loss "
        f"{found['loss']:.4f}; least margin {found['least_margin']:.2f} nats, log-odds at most {apart} nats "
        f"from jaxgpt's; largest process {found['peak_bytes'] / 2**30:.1f} GiB ({versions})",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=20, help="of SFT")
    parser.add_argument("--folder", type=Path, help="where all models are written and left; by default nothing stays")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="round-trip-") as folder:
        place = options.folder or Path(folder)
        told = {"preset": options.preset, "steps": options.steps, "loss": travel(options.preset, options.steps, place)}
        found = {**told, **ask(place)}
    print(json.dumps(found) if options.json else table(found))
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
