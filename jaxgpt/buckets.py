"""The sizes that generation runs at: few, known beforehand, so that nothing compiles later."""

from dataclasses import dataclass

from jaxgpt import cache as kv
from jaxgpt.errors import InputError

MINIMUM_PREFILL = 16
"""Smallest prompt bucket."""


@dataclass(frozen=True)
class Buckets:
    """Every size of batch, prompt and cache that generations may meet: all that is ever compiled."""

    batches: tuple[int, ...]
    widths: tuple[int, ...]
    """Of prompts, and of what is appended to a conversation."""
    slots: tuple[int, ...]
    """Of the cache: prompt and reply."""

    @classmethod
    def upto(cls, batch: int, prompt: int, tokens: int) -> "Buckets":
        """For batches of at most `batch` rows of at most `tokens` tokens, of which at most `prompt` at once.

        Raises:
            InputError: a number below 1, or a prompt longer than all tokens.
        """
        for name, value in (("batch", batch), ("prompt", prompt), ("tokens", tokens)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if prompt > tokens:
            raise InputError(f"a prompt of {prompt:,} does not fit {tokens:,} tokens; raise tokens or lower prompt")
        return cls(
            _powers(1, kv.bucket(batch, 1)),
            _powers(MINIMUM_PREFILL, kv.bucket(prompt, MINIMUM_PREFILL)),
            _powers(kv.MINIMUM_SLOTS, kv.bucket(tokens)),
        )

    def widths_in(self, slots: int) -> tuple[int, ...]:
        """Prompt sizes that occur with a cache of this size."""
        return tuple(width for width in self.widths if width <= slots)

    @property
    def programs(self) -> int:
        """Most programs that are compiled, single operations included.

        For each batch and cache: its zeros, the first id, the decode loop, two that double the cache
        and its ids, and a prefill for each prompt.
        """
        return len(self.batches) * sum(5 + len(self.widths_in(slots)) for slots in self.slots)

    def __str__(self) -> str:
        sizes = [
            f"{name} {', '.join(f'{size:,}' for size in values)}"
            for name, values in (("batches", self.batches), ("prompts", self.widths), ("caches", self.slots))
        ]
        return f"{'; '.join(sizes)}: at most {self.programs:,} programs"


def _powers(first: int, last: int) -> tuple[int, ...]:
    """Powers of two from `first` to `last`, both included."""
    return tuple(first << n for n in range((last // first).bit_length()))
