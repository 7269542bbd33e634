"""The main job on this machine, with the commands a user would type: text to a model that obeys.

The Python standard library's source becomes token shards; a small GPT pretrains on
them and is compared with a bigram model on held-out files; SFT teaches it to answer;
sixteen answers are asked for; `check` and the oracle examine it; one turn of chat.
Everything lands in the folder given (default `demo`), which is replaced.

    python scripts/demo.py [FOLDER]
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxgpt.data.instructions import MICRO, generate

PRETRAIN_STEPS = 500
SFT_STEPS = 400
MARGIN = 0.25
"""Nats a token by which the model must beat the bigram model."""
MARKER = ".jaxgpt-demo"


class DemoFailed(Exception):
    """A stage did not do what it promises."""


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(words: list[str]) -> None:
    """A command, as a user would type it, with its output shown."""
    print(f"$ {' '.join(words)}", flush=True)
    code = subprocess.run(_located(words), check=False).returncode
    if code:
        raise DemoFailed(f"`{' '.join(words)}` ended with exit code {code}")


def output_of(words: list[str]) -> str:
    """A command's stdout."""
    print(f"$ {' '.join(words)}", flush=True)
    done = subprocess.run(_located(words), check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DemoFailed(f"`{' '.join(words)}` ended with exit code {done.returncode}")
    return done.stdout


def _located(words: list[str]) -> list[str]:
    """`jaxgpt` and `python` are the ones of this environment."""
    environment = Path(sys.executable).parent
    return [sys.executable if words[0] == "python" else str(environment / words[0]), *words[1:]]


def flags(**values: Any) -> list[str]:
    """`--name value` for each."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def prepare(folder: Path) -> None:
    """An empty folder; an older demo's is replaced, anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise DemoFailed(f"{folder} is not empty and not an older demo's; give another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def held_out_losses(data: Path, model: Path) -> tuple[float, float]:
    """(model, bigram) mean loss in nats a token, on the same tokens of held-out files."""
    from jaxgpt import checkpoint
    from jaxgpt.data.batches import validation
    from jaxgpt.data.shards import TokenShards
    from jaxgpt.evaluate.bigram import InterpolatedBigram
    from jaxgpt.loss import evaluate

    loaded = checkpoint.load(model)
    same_tokens = list(validation(TokenShards(data, "val"), 16, 128, limit=40))
    bigram = InterpolatedBigram(loaded.config.vocab_size)
    bigram.count(validation(TokenShards(data), 64, 1024))
    params: Any = loaded.params
    return evaluate(loaded.config, params, same_tokens, "float32"), bigram.loss(same_tokens)


def answered(model: Path, questions: Path) -> int:
    """How many of the sixteen are answered exactly, greedily, through `jaxgpt generate`."""
    write_jsonl(questions, [{"messages": messages[:-1]} for messages in MICRO])
    words = ["jaxgpt", "generate", str(model), "--messages", str(questions), "--max-new-tokens", "48", "--json"]
    replies = [json.loads(line) for line in output_of(words).splitlines()]
    right = 0
    for messages, reply in zip(MICRO, replies, strict=True):
        expected = messages[-1]["content"]
        correct = reply["text"] == expected
        right += correct
        mark = "right" if correct else f"WRONG, expected {expected!r}"
        print(f"  {messages[0]['content']!r} → {reply['text']!r}  {mark}", flush=True)
    return right


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    started = time.monotonic()
    try:
        demo(folder)
    except DemoFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    base, assistant = folder / "base", folder / "assistant"
    print(f"""
Done in {time.monotonic() - started:.0f} s. What there is now:
  checkpoint    {assistant}  (base model: {base})
  logs          {assistant / "log.jsonl"}, {assistant / "tensorboard"}; {base / "log.jsonl"}, {base / "tensorboard"}
  loss curves   {base / "loss.png"}, {assistant / "loss.png"}
Talk to it:
  {Path(sys.executable).parent / "jaxgpt"} chat {assistant}""")
    return 0


def demo(folder: Path) -> None:
    prepare(folder)
    data, base, assistant = folder / "data", folder / "base", folder / "assistant"

    heading("1/7 Encode: the Python standard library's source")
    run(["jaxgpt", "data", "encode", "stdlib", "--out", str(data), "--tokenizer", "char"])

    heading("2/7 Pretrain: a small GPT, from nothing")
    pretraining = flags(data=data, out=base, preset="tiny", steps=PRETRAIN_STEPS, sequence_length=128)
    run(["jaxgpt", "pretrain", *pretraining, *flags(learning_rate=3e-3, eval_every=100, sample_every=250)])
    ours, bigram = held_out_losses(data, base)
    print(f"held-out files: model {ours:.3f} nats a token, interpolated bigram {bigram:.3f}", flush=True)
    if ours > bigram - MARGIN:
        raise DemoFailed(f"the model beats the bigram model by {bigram - ours:.3f} nats, expected at least {MARGIN}")

    heading("3/7 SFT: learn to answer")
    chats = folder / "instructions.jsonl"
    taught = [*generate(1500, seed=0), *MICRO * 40]
    random.Random(0).shuffle(taught)  # SFT holds out the last rows
    write_jsonl(chats, [{"messages": messages} for messages in taught])
    teaching = flags(model=base, data=chats, out=assistant, steps=SFT_STEPS, sequence_length=128)
    run(["jaxgpt", "sft", *teaching, *flags(learning_rate=2e-3, eval_every=125)])

    heading("4/7 Ask: the sixteen answers it was taught")
    right = answered(assistant, folder / "questions.jsonl")
    print(f"{right}/{len(MICRO)} right", flush=True)
    if right != len(MICRO):
        raise DemoFailed(f"{right} of {len(MICRO)} answers are right, expected all")

    heading("5/7 Check: training, prefill and cached decoding are the same model")
    run(["jaxgpt", "check", str(assistant)])

    heading("6/7 Oracle: an independent PyTorch model agrees")
    run(["python", "-m", "oracle", "compare", str(assistant)])

    heading("7/7 Chat")
    run(["jaxgpt", "chat", str(assistant), MICRO[0][0]["content"]])


if __name__ == "__main__":
    raise SystemExit(main())
