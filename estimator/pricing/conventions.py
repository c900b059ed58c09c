"""Model FLOPs of a step by the conventions that others report an MFU in: the same seconds, other numerators.

An MFU is model FLOPs / (seconds x peak). Projects count the FLOPs differently, by up to a third on the same run, so
that a figure can only be compared with one of the same convention. All of them leave out what is recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError, choose, shown

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig

CONVENTIONS = {
    "ledger": "every matrix product of forward and backward as it is in the model: attention whole, logits counted, "
    "the embedding's lookup not",
    "megatron": "the same: Megatron-LM and NeMo until 2024, Korthikanti et al. 2022",
    "causal": "the same with attention halved, for the half of the scores that a causal mask keeps, a sliding window "
    "or not: Megatron-Bridge since 2025, MaxText since its pull request 1988",
    "palm": "6 N + 12 L h e T a token, N without learned positions, an untied embedding counted: PaLM (Chowdhery et "
    "al. 2022, appendix B), nanoGPT, torchtitan's tables of 2024",
    "llm-foundry": "6 N + 12 L d T a token, N with everything: its benchmarking tables",
    "6N": "6 N a token, attention left out: what hours of a published run are usually turned into",
}


def flops_per_token(m: ModelConfig, seq_len: int, parameters: int, convention: str, ledger: float) -> float:
    """Training FLOPs of one token in a sequence of `seq_len`.

    Args:
        m: the model.
        seq_len: T.
        parameters: N, shared ones once. Of experts those that a token goes through (`active_parameters`), as everybody
            does for models with experts.
        convention: one of `CONVENTIONS`.
        ledger: the same FLOPs as the ledger has them.

    Raises:
        ConfigError: unknown convention.
    """
    choose("convention", convention, CONVENTIONS)
    positions = m.context_length * m.d_model if m.made_of.positions.kind == "learned" else 0
    attention = 12 * m.num_layers * m.width_of_heads * seq_len  # 2 products of 2 T h e FLOPs, three times
    if convention == "6N":
        return 6 * parameters
    if convention == "palm":
        return 6 * (parameters - positions) + attention
    if convention == "llm-foundry":
        return 6 * parameters + 12 * m.num_layers * m.d_model * seq_len
    return ledger - attention / 2 if convention == "causal" else ledger


def model_flops_utilisation(
    m: ModelConfig, seq_len: int, parameters: int, tokens_per_second: float, peak_flops: float, ledger: float
) -> dict[str, float]:
    """The MFU of a run under each of `CONVENTIONS`.

    Args:
        m: the model.
        seq_len: T.
        parameters: N, those that a token goes through.
        tokens_per_second: of one accelerator.
        peak_flops: FLOP/s of one accelerator.
        ledger: model FLOPs of a token, as the ledger has them.

    Raises:
        ConfigError: a peak that is not above 0.
    """
    if not peak_flops > 0:
        raise ConfigError(f"peak_flops = {shown(peak_flops)}: must be above 0")
    return {
        name: flops_per_token(m, seq_len, parameters, name, ledger) * tokens_per_second / peak_flops
        for name in CONVENTIONS
    }
