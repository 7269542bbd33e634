"""Greedy decoding and teacher-forced cached logits, in the plainest form."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchref.decoder import Decoder


@torch.no_grad()
def greedy(
    model: Decoder,
    ids: Int[Tensor, "B T"],
    steps: int,
    *,
    attention_mask: Tensor | None = None,
    cache: bool = True,
    real_ids: int | None = None,
) -> Int[Tensor, "B steps"]:
    """The `steps` tokens of highest logit after each prompt; the lowest id wins a tie.

    Args:
        model: the model.
        ids: prompts; ragged ones padded on the left.
        steps: how many tokens; nothing stops earlier.
        attention_mask: (B, T), false for padding.
        cache: keep keys and values; without it every step recomputes the whole sequence.
        real_ids: choose below this id only (rows of the embedding above it are padding).
    """
    _check_left_padded(attention_mask)
    past = model.empty_cache(len(ids)) if cache else None
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    sequence, seen = ids, 0
    for _ in range(steps):
        logits = model(sequence[:, seen:], attention_mask=mask[:, seen:], past=past)[:, -1, :real_ids]
        if cache:
            seen = sequence.shape[1]
        sequence = torch.cat((sequence, logits.argmax(dim=-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return sequence[:, ids.shape[1] :]


@torch.no_grad()
def cached_logits(
    model: Decoder,
    prompt_ids: Int[Tensor, "B T"],
    forced_ids: Int[Tensor, "B steps"],
    *,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "B steps V"]:
    """Logits that predict each forced token: the first from the prefill, then one cached step each.

    Entry s has read the prompt and `forced_ids[:, :s]`; the last forced token is never fed.
    """
    _check_left_padded(attention_mask)
    past = model.empty_cache(len(prompt_ids))
    logits = [model(prompt_ids, attention_mask=attention_mask, past=past)[:, -1]]
    for step in range(forced_ids.shape[1] - 1):
        logits.append(model(forced_ids[:, step : step + 1], past=past)[:, -1])
    return torch.stack(logits, dim=1)


def _check_left_padded(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("the last column of attention_mask has padding; pad prompts on the left")
