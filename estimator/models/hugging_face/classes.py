"""Which decoder is written like which class of transformers, by `Written.decoder`."""

from __future__ import annotations

from estimator.models.hugging_face.biogpt import XGLM, BioGpt
from estimator.models.hugging_face.bloom import Bloom
from estimator.models.hugging_face.ctrl import CTRL
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.falcon import Falcon
from estimator.models.hugging_face.gpt2 import GPT2
from estimator.models.hugging_face.gpt_bigcode import GPTBigCode
from estimator.models.hugging_face.gpt_neo import GPTNeo
from estimator.models.hugging_face.gpt_neox import GPTNeoX
from estimator.models.hugging_face.gptj import GPTJ, CodeGen
from estimator.models.hugging_face.mpt import Mpt
from estimator.models.hugging_face.openai import OpenAIGPT
from estimator.models.hugging_face.opt import OPT
from estimator.models.hugging_face.persimmon import Persimmon
from estimator.models.hugging_face.phi import Phi

DECODERS: dict[str, type[HFDecoder]] = {
    "biogpt": BioGpt,
    "bloom": Bloom,
    "codegen": CodeGen,
    "ctrl": CTRL,
    "falcon": Falcon,
    "gpt2": GPT2,
    "gpt_bigcode": GPTBigCode,
    "gpt_neo": GPTNeo,
    "gpt_neox": GPTNeoX,
    "gptj": GPTJ,
    "llama": HFDecoder,
    "mpt": Mpt,
    "openai-gpt": OpenAIGPT,
    "opt": OPT,
    "phi": Phi,
    "persimmon": Persimmon,
    "xglm": XGLM,
}
