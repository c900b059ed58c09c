"""Sampling text from a model, with each token's keys and values computed once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from estimator.describe.checks import ConfigError, positive_int

if TYPE_CHECKING:
    from trainer.model.attention import KeysAndValues
    from trainer.model.decoder import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    *,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `prompt`, one sampled token a step.

    A model sees at most its last `context_length` tokens. Up to there the cache makes a step cost one token; beyond,
    each step moves every token to another position, so nothing cached holds and each step costs the whole window, as
    it does without a cache.

    Args:
        model: a `Transformer`; its mode (train or eval) is as before afterwards.
        prompt: (B, T) or (T,) integer ids, T at least 1, on the model's device.
        max_new_tokens: the most tokens to append.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the fewest likeliest tokens that together have at least this probability (Holtzman et al.
            2020, "nucleus"); with top_k, among those of the k.
        eos_token_id: a row that has produced it is finished and is filled up with it; when all are, generation ends.
        use_cache: False computes every step from the tokens alone; same result up to rounding.
        generator: the source of randomness, on the model's device; None is torch's global one.

    Returns:
        prompt and continuation, (B, T + n) or (T + n,) int64 with n at most max_new_tokens.

    Raises:
        ConfigError: an argument is out of its range, or the model's logits are not numbers.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p)
    C = model.config.context_length
    ids_BT = (prompt if prompt.ndim == 2 else prompt[None]).long()
    finished_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    was_training = model.training
    model.eval()
    cache = model.new_cache(len(ids_BT)) if use_cache else None
    for _ in range(max_new_tokens):
        next_B = sample(_last_logits(model, ids_BT, C, cache), temperature, top_k, top_p, generator)
        if eos_token_id is not None:
            next_B = next_B.masked_fill(finished_B, eos_token_id)
            finished_B |= next_B == eos_token_id
        ids_BT = torch.cat((ids_BT, next_B[:, None]), 1)
        if eos_token_id is not None and finished_B.all():
            break
    model.train(was_training)
    return ids_BT if prompt.ndim == 2 else ids_BT[0]


def _last_logits(model: Transformer, ids_BT: Tensor, C: int, cache: list[KeysAndValues] | None) -> Tensor:
    """The logits after the last token, (B, V)."""
    if cache is None or ids_BT.shape[1] > C:
        logits: Tensor = model(ids_BT[:, -C:])
    else:
        logits = model(ids_BT[:, cache[0].length :], cache)
    return logits[:, -1]


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row, (B,), drawn from softmax(logits / temperature) cut to `top_k` and `top_p`.

    Raises:
        ConfigError: a logit is not a number.
    """
    if logits_BV.isnan().any():
        raise ConfigError("logits: not numbers; the model's training diverged")
    if temperature == 0:
        return logits_BV.argmax(-1)
    # The maximum goes first: the division then overflows to -inf, probability 0, at worst. From likeliest to least.
    shifted_BV = (logits_BV.float() - logits_BV.amax(-1, keepdim=True).float()) / temperature
    sorted_BV, order_BV = shifted_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BV, order_BV = sorted_BV[:, :top_k], order_BV[:, :top_k]
    p_BV = sorted_BV.softmax(-1)
    if top_p is not None:
        # A token stays if those before it have less than top_p together: the first always does.
        p_BV = p_BV.masked_fill(p_BV.cumsum(-1) - p_BV >= top_p, 0)
    drawn_B1: Tensor = order_BV.gather(-1, torch.multinomial(p_BV, 1, generator=generator))
    return drawn_B1[:, 0]


def _check(
    model: Transformer, prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if prompt.ndim not in (1, 2) or prompt.numel() == 0 or prompt.is_floating_point() or prompt.is_complex():
        raise ConfigError(
            f"prompt of shape {tuple(prompt.shape)} and dtype {prompt.dtype}: must be (B, T) or (T,) ids, at least one"
        )
    low, high = (int(end) for end in prompt.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise ConfigError(f"prompt id {low if low < 0 else high}: must be in [0, {model.config.vocab_size})")
    if max_new_tokens != 0:
        positive_int("max_new_tokens", max_new_tokens)
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature = {temperature!r}: must be a finite number of at least 0")
    if top_k is not None:
        positive_int("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p!r}: must be above 0 and at most 1")
