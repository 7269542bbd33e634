"""An independent PyTorch reference for GPT-2, Llama, Mistral and Qwen.

It shares no code with the program it checks: its own reading of config.json, its
own model, cache and decoding. Parameters have Hugging Face's names, so that a
folder loads without a mapping table in between.
"""

from torchref.config import LoadError
from torchref.decoder import Cache, Decoder
from torchref.generate import cached_logits, greedy
from torchref.load import build, load

__all__ = ["Cache", "Decoder", "LoadError", "build", "cached_logits", "greedy", "load"]
