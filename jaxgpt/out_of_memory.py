"""Out of memory, told in one line: which errors mean it, and what each command can do about it."""

import errno
import re

REMEDIES = {
    "pretrain": "halve --batch-size and double --accumulate; --dry-run says what fits",
    "sft": "halve --batch-size and double --accumulate; --dry-run says what fits",
    "generate": "give fewer or shorter prompts, a smaller --max-new-tokens, or --compute-dtype bfloat16",
    "chat": "start the conversation again, or pass --compute-dtype bfloat16",
    "bench": "lower --max-tokens, or pass --compute-dtype bfloat16",
    "data": "lower --workers, or encode fewer sources at once",
}
"""By the first word of the verb."""
ELSE = "free memory, or use a machine with more"


def means(error: BaseException) -> bool:
    """True for Python's and NumPy's MemoryError, XLA's RESOURCE_EXHAUSTED and the system's ENOMEM."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # By name: jaxlib is not imported to find out. It renamed XlaRuntimeError to JaxRuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"JaxRuntimeError", "XlaRuntimeError"}) and "RESOURCE_EXHAUSTED" in str(error)


def told(error: BaseException, verb: str) -> str:
    """One line: how much was asked for, where the error says so, and what to lower."""
    return f"out of memory{_asked(str(error))}; {REMEDIES.get(verb, ELSE)}"


def _asked(text: str) -> str:
    """`Out of memory allocating 400000 bytes` (XLA), `Unable to allocate 728. TiB` (NumPy)."""
    found = re.search(r"alloca\w+ (\d[\d.]*) ?([KMGTPE]i?B|bytes)", text)
    return f", {found[1].rstrip('.')} {found[2]} were asked for at once" if found else ""
