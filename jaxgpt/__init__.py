"""Train, fine-tune, chat with, check and convert GPT-2- and Llama-class models in JAX.

`jaxgpt.load(DIR)` gives an `LM` with `config`, `tokenizer`, `logits` and `generate`.
Names are loaded when first used, so that `import jaxgpt` and `jaxgpt --help` are fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt.errors import InputError as InputError
    from jaxgpt.lm import LM as LM
    from jaxgpt.lm import Completion as Completion
    from jaxgpt.loading import load as load

__version__ = "0.1.0"
__all__ = ["Completion", "InputError", "LM", "__version__", "load"]

_HOME = {"load": "jaxgpt.loading", "LM": "jaxgpt.lm", "Completion": "jaxgpt.lm", "InputError": "jaxgpt.errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
