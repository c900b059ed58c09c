"""Which decoder is written like which class of transformers (`Written.decoder`), imported where it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from estimator.describe.transformers import Written
    from estimator.models.decoder import Transformer

DECODERS = {  # (file beside this one, class)
    "biogpt": ("biogpt", "BioGpt"),
    "bloom": ("bloom", "Bloom"),
    "codegen": ("gptj", "CodeGen"),
    "ctrl": ("ctrl", "CTRL"),
    "falcon": ("falcon", "Falcon"),
    "gpt2": ("gpt2", "GPT2"),
    "gpt_bigcode": ("gpt_bigcode", "GPTBigCode"),
    "gpt_neo": ("gpt_neo", "GPTNeo"),
    "gpt_neox": ("gpt_neox", "GPTNeoX"),
    "gptj": ("gptj", "GPTJ"),
    "llama": ("decoder", "HFDecoder"),
    "mpt": ("mpt", "Mpt"),
    "openai-gpt": ("openai", "OpenAIGPT"),
    "opt": ("opt", "OPT"),
    "persimmon": ("persimmon", "Persimmon"),
    "phi": ("phi", "Phi"),
    "xglm": ("biogpt", "XGLM"),
}


def decoder_of(written: Written) -> type[Transformer]:
    """The decoder that is written so."""
    file, name = DECODERS[written.decoder]
    found: type[Transformer] = getattr(import_module(f"estimator.models.hugging_face.{file}"), name)
    return found
