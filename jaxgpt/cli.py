"""The command `jaxgpt`: finds the verb, builds its settings, calls its one function.

Only the standard library is imported here; a verb's module, and what is heavy in
it, is imported when that verb was chosen.
"""

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

from jaxgpt import __version__, options, out_of_memory
from jaxgpt import settings as s
from jaxgpt.errors import InputError
from jaxgpt.stop_signals import interrupting, told


@dataclass(frozen=True)
class Verb:
    """One thing the command can do."""

    name: str
    settings: type
    run: str
    """`module:function` of `jaxgpt.verbs`; the function takes settings and `Output`."""
    summary: str


VERBS = (
    Verb("data encode", s.DataEncodeSettings, "data:encode", "text, JSONL or source files to token shards"),
    Verb("data inspect", s.DataInspectSettings, "data:inspect", "show which tokens of chat JSONL are trained"),
    Verb("pretrain", s.PretrainSettings, "train:pretrain", "train a base model on token shards"),
    Verb("sft", s.SFTSettings, "train:sft", "teach a model to answer, from chat JSONL"),
    Verb("generate", s.GenerateSettings, "talk:generate", "continue texts, or answer conversations"),
    Verb("chat", s.ChatSettings, "talk:chat", "talk with a model"),
    Verb("check", s.CheckSettings, "check:check", "prove that training and inference are the same model"),
    Verb("inspect", s.InspectSettings, "look:inspect", "say what a checkpoint, Hugging Face folder or GGUF file holds"),
    Verb("bench", s.BenchSettings, "bench:bench", "measure prefill and decode speed"),
    Verb("import", s.ImportSettings, "convert:import_", "turn a Hugging Face folder or .pt file into a checkpoint"),
    Verb("export", s.ExportSettings, "convert:export", "turn a checkpoint into a Hugging Face folder or a GGUF file"),
    Verb("tokenizer add", s.TokenizerAddSettings, "tokenizer:add", "give a model more tokens of content"),
    Verb("tokenizer repair", s.TokenizerRepairSettings, "tokenizer:repair", "put a checkpoint's tokenizer right"),
    Verb("hub download", s.HubDownloadSettings, "hub:download", "fetch models of the Hugging Face hub"),
    Verb("hub upload", s.HubUploadSettings, "hub:upload", "put a checkpoint or Hugging Face folder on the hub"),
    Verb("hub list", s.HubListSettings, "hub:list_", "name the models of a user or organisation"),
)
GROUPS = ("data", "tokenizer", "hub")
"""First words of verbs that have two."""

EXAMPLES = """\
  jaxgpt data encode stdlib --out data --tokenizer char
  jaxgpt pretrain --data data --out base --steps 600
  jaxgpt sft --model base --data chats.jsonl --out assistant
  jaxgpt chat assistant
  jaxgpt generate base "def main(" --temperature 0.8 --max-new-tokens 64
"""
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a stream or file that takes no more is told by, without its name."""
BUG = "jaxgpt: this is a bug in jaxgpt {}; please open an issue with the lines above and the command"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 a failed check or a bug, 2 input that cannot be used, 130 Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with interrupting():
            code = _guarded(words)
    except KeyboardInterrupt:
        code = 130
    _flush()
    if code and "jaxgpt.processes" in sys.modules:
        sys.modules["jaxgpt.processes"].end(code)
    return code


def _guarded(words: list[str]) -> int:
    debug = "--debug" in words
    try:
        code = _run(words)
        sys.stdout.flush()
        return code or (130 if told() else 0)
    except InputError as error:
        if debug:
            traceback.print_exc()
        return _refuse(str(error))
    except BrokenPipeError:
        return 141  # whoever read stdout has gone
    except Exception as error:
        if told() and not debug:
            return 130  # native code that was interrupted raises errors of its own
        message = _no_bug(error, words[0] if words else "")
        if debug or not message:
            traceback.print_exc()
        return _refuse(message) if message else _report_bug()


def _no_bug(error: Exception, verb: str) -> str:
    """What gets one line: no memory, a file or stream that cannot be used, JAX told what it does not know."""
    if out_of_memory.means(error):
        return out_of_memory.told(error, verb)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check that it exists and may be used"
    if isinstance(error, OSError) and error.errno in UNWRITTEN:
        return f"writing failed: {error.strerror}; check the disk, and where standard output and error go"
    variables = sorted(name for name in os.environ if name.startswith("JAX_"))
    if isinstance(error, ValueError) and variables and "jax" not in sys.modules and _raised_in(error, "jax"):
        return f"JAX cannot be imported: {error}; correct or unset {', '.join(variables)}"
    return ""


def _raised_in(error: Exception, package: str) -> bool:
    return any(
        frame.f_globals.get("__name__", "").partition(".")[0] == package
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _flush() -> None:
    """Flush what was printed; Python does at exit, and complains about what cannot be written."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _refuse(message: str) -> int:
    with suppress(OSError):
        print(f"jaxgpt: {_one_line(message)}", file=sys.stderr, flush=True)
    return 2


def _report_bug() -> int:
    print(BUG.format(__version__), file=sys.stderr)
    return 1


def _one_line(message: str) -> str:
    """Text that a user gave may be in it: nothing in it moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in message)


def _run(words: list[str]) -> int:
    for name, stream in (("output", sys.stdout), ("error", sys.stderr)):
        if stream is None:  # pyright: ignore[reportUnnecessaryComparison]
            # Whatever file is opened next would take its place, and be written to by native code.
            raise InputError(f"standard {name} is closed; send it to a file, or to {os.devnull}")
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help(), end="")
        return 0
    if words[0] in ("--version", "-V"):
        print(f"jaxgpt {__version__}")
        return 0
    if words[0] in GROUPS and words[1:] in ([], ["--help"], ["-h"]):
        print("\n".join(_lines([verb for verb in VERBS if verb.name.startswith(f"{words[0]} ")])))
        return 0
    verb, rest = _verb(words)
    before_text = rest[: rest.index("--")] if "--" in rest else rest
    if "--help" in before_text or "-h" in before_text:
        print(options.usage(verb.settings, f"jaxgpt {verb.name}", verb.summary), end="")
        return 0
    parsed = options.parse(verb.settings, rest, f"jaxgpt {verb.name}")
    _check_folder()
    module, _, function = verb.run.partition(":")
    from jaxgpt.verbs.output import Output

    with Output.opened(parsed.output, parsed.given) as output:
        return getattr(import_module(f"jaxgpt.verbs.{module}"), function)(parsed.settings, output)


def _check_folder() -> None:
    """Paths are made absolute, and go where only UTF-8 does."""
    try:
        os.getcwd().encode()
    except FileNotFoundError:
        raise InputError("the working directory is gone; change to another") from None
    except UnicodeEncodeError:
        raise InputError(f"the working directory {os.getcwd()!r} is not UTF-8; change to another") from None


def _verb(words: list[str]) -> tuple[Verb, list[str]]:
    for verb in VERBS:
        parts = verb.name.split()
        if words[: len(parts)] == parts:
            return verb, words[len(parts) :]
    asked = " ".join(words[:2] if words[0] in GROUPS else words[:1])
    if asked.startswith("-"):
        raise InputError(f"the verb comes first, got {asked}; for example `jaxgpt chat DIRECTORY`, see `jaxgpt --help`")
    known = [verb.name for verb in VERBS]
    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.0)[0]
    raise InputError(f"unknown verb {asked!r}; the nearest is {near}; see `jaxgpt --help`")


def _lines(verbs: Sequence[Verb]) -> list[str]:
    return [f"  {verb.name:<18}{verb.summary}" for verb in verbs]


def _help() -> str:
    head = "usage: jaxgpt VERB …\n\nTrain, fine-tune, chat with, check and convert GPT-2- and Llama-class models.\n"
    tail = "`jaxgpt VERB --help` shows a verb's flags. Every verb takes --config FILE.toml, --json and --debug."
    return "\n".join([head, "verbs:", *_lines(VERBS), "", "examples:", f"{EXAMPLES}\n{tail}\n"])


if __name__ == "__main__":
    sys.exit(main())
