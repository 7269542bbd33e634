"""How ids are drawn and when to stop, as a user says it; checked where it is made."""

from dataclasses import dataclass

from jaxgpt.errors import InputError


@dataclass(frozen=True)
class GenerationSettings:
    """How ids are drawn from logits, and when to stop."""

    max_new_tokens: int = 128
    """most tokens to generate"""
    temperature: float = 0.0
    """0 is greedy: the most likely token, every time, whatever the other settings say"""
    top_k: int = 0
    """sample from the k most likely tokens; 0 for all"""
    top_p: float = 1.0
    """sample from the most likely tokens that together reach this probability"""
    min_p: float = 0.0
    """sample from tokens at least this share as likely as the most likely one"""
    repetition_penalty: float = 1.0
    """above 1 makes every token of prompt and reply less likely to come again"""
    no_repeat_ngram_size: int = 0
    """no sequence of this many tokens comes twice, the prompt's included; 0 for any"""
    seed: int = 0
    """the same seed gives the same text"""
    stop: tuple[str, ...] = ()
    """stop when this text appears (repeatable); it is not printed"""
    logprobs: bool = False
    """with --json, also the model's log-probability of each token, before any of these settings"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 1e6:
            raise InputError(f"temperature must be in 0–1,000,000, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be ≥ 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise InputError(f"repetition_penalty must be in 0.01–100, 1 for none, got {self.repetition_penalty}")
        if self.no_repeat_ngram_size < 0:
            raise InputError(f"no_repeat_ngram_size must be ≥ 0, got {self.no_repeat_ngram_size}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in 0–{2**32 - 1}, got {self.seed}")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty; give the text to stop at")

    @property
    def ignored_by_greedy(self) -> tuple[str, ...]:
        """Settings of the draw that were given although at temperature 0 nothing is drawn."""
        given = {
            "top_k": self.top_k > 0,
            "top_p": self.top_p < 1.0,
            "min_p": self.min_p > 0.0,
            "repetition_penalty": self.repetition_penalty != 1.0,
            "no_repeat_ngram_size": self.no_repeat_ngram_size > 0,
        }
        return tuple(name for name, is_set in given.items() if is_set) if self.temperature <= 0 else ()
