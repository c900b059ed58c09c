"""Which decoder is written like which class of transformers, by `Written.decoder`."""

from __future__ import annotations

from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt2 import GPT2

DECODERS: dict[str, type[HFDecoder]] = {"gpt2": GPT2, "llama": HFDecoder}
