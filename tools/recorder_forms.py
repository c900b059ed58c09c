"""Closed forms of other people's modules, and the real steps that they are held against at sizes not used.

Each entry: what builds the step from its sizes, the sizes that are fitted to, and sizes at which a real step judges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from recorder_cases import Block
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

V = 97  # the vocabulary, where it is no letter
TOKENS = {"B": (2, 3, 5), "T": (11, 13, 17)}
WIDER = {"d": (12, 20, 28), "L": (3, 4, 5)}


class Form(NamedTuple):
    """A module as a function of its sizes.

    Attributes:
        build: what `trainer.closed_forms` takes.
        sizes: what it is fitted to.
        unseen: sizes that it is judged at.
    """

    build: Callable[..., Any]
    sizes: dict[str, tuple[int, ...]]
    unseen: dict[str, int]


def _loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return module(**batch).loss


def _of(config: str, model: str, **named: Any) -> Callable[..., Any]:
    """transformers' class; of the names of its fields those in `named` are letters or products of them."""

    def build(B: int, T: int, **sizes: int) -> Any:
        torch.manual_seed(0)
        fields = {k: v(sizes) if callable(v) else v for k, v in named.items()}
        module = getattr(transformers, model)(getattr(transformers, config)(vocab_size=V, use_cache=False, **fields))
        ids = torch.randint(2, V, (B, T))
        return module.train(), _loss, ({"input_ids": ids, "labels": ids},)

    return build


def _width(times: int = 1) -> Callable[[dict[str, int]], int]:
    return lambda sizes: times * sizes["d"]


def _layers(sizes: dict[str, int]) -> int:
    return sizes["L"]


LLAMA = {
    "hidden_size": _width(),
    "num_hidden_layers": _layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": _width(3),
    "max_position_embeddings": 64,
}
ENCODER = {
    "hidden_size": _width(),
    "num_hidden_layers": _layers,
    "num_attention_heads": 4,
    "intermediate_size": _width(4),
}


def _vit(B: int, d: int, L: int) -> Any:
    config = transformers.ViTConfig(
        hidden_size=d,
        num_hidden_layers=L,
        num_attention_heads=4,
        intermediate_size=4 * d,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )
    module = transformers.ViTForImageClassification(config)
    return module.train(), _loss, ({"pixel_values": torch.rand(B, 3, 32, 32), "labels": torch.randint(7, (B,))},)


class NanoGPT(nn.Module):
    """nanoGPT's model of any size; its blocks are those of `recorder_cases`."""

    def __init__(self, V: int, C: int, L: int, d: int) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(V, d), nn.Embedding(C, d), nn.Dropout(0.1)
        self.h = nn.ModuleList(Block(d, 4, 0.1) for _ in range(L))
        self.ln_f, self.lm_head = nn.LayerNorm(d), nn.Linear(d, V, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> ()."""
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), ids.flatten())


def _nanogpt(B: int, T: int, d: int, L: int, V: int) -> Any:
    return NanoGPT(V, 64, L, d), lambda module, ids: module(ids), (torch.randint(V, (B, T)),)


class Residual(nn.Module):
    """ResNet's basic block (He et al. 2015, figure 5)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, c, H, H) to the same."""
        y = F.relu(self.norm1(self.one(x)))
        return F.relu(self.norm2(self.two(y)) + x)


def _resnet(B: int, H: int, c: int, L: int) -> Any:
    blocks = [Residual(c) for _ in range(L)]
    module = nn.Sequential(nn.Conv2d(3, c, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module.append(nn.Linear(c, 10))
    labels = torch.randint(10, (B,))
    return module, lambda m, x: F.cross_entropy(m(x), labels), (torch.rand(B, 3, H, H),)


class Tagger(nn.Module):
    """An LSTM over 7 embedded tokens.

    With their number the step becomes longer and its tensors larger, which no form has: each number has its own.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(V, d), nn.LSTM(d, 2 * d, num_layers=2, batch_first=True)
        self.out = nn.Linear(2 * d, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, V)."""
        return self.out(self.lstm(self.embedding(ids))[0])


def _lstm(B: int, d: int) -> Any:
    ids = torch.randint(V, (B, 7))
    return Tagger(d), lambda module, ids: F.cross_entropy(module(ids).flatten(0, 1), ids.flatten()), (ids,)


FORMS = {
    "transformers' GPT-2": Form(
        _of("GPT2Config", "GPT2LMHeadModel", n_embd=_width(), n_layer=_layers, n_head=4, n_positions=64,
            bos_token_id=None, eos_token_id=None),
        TOKENS | WIDER, {"B": 4, "T": 31, "d": 48, "L": 6}),
    "transformers' Llama": Form(_of("LlamaConfig", "LlamaForCausalLM", **LLAMA),
                                TOKENS | {"d": (24, 40, 56), "L": (3, 4, 5)}, {"B": 4, "T": 31, "d": 64, "L": 7}),
    "transformers' Mistral": Form(_of("MistralConfig", "MistralForCausalLM", **LLAMA, head_dim=None),
                                  TOKENS | {"d": (24, 40, 56), "L": (3, 4, 5)}, {"B": 7, "T": 29, "d": 48, "L": 6}),
    "transformers' Qwen3": Form(_of("Qwen3Config", "Qwen3ForCausalLM", **LLAMA, head_dim=16), TOKENS | WIDER,
                                {"B": 4, "T": 31, "d": 36, "L": 6}),
    "transformers' Gemma 2": Form(
        _of("Gemma2Config", "Gemma2ForCausalLM", **LLAMA, head_dim=16, sliding_window=8, attn_implementation="eager"),
        TOKENS | {"d": (12, 20, 28), "L": (4, 6, 8)}, {"B": 4, "T": 31, "d": 36, "L": 10}),
    "transformers' BERT": Form(_of("BertConfig", "BertForMaskedLM", **ENCODER), TOKENS | WIDER,
                               {"B": 4, "T": 31, "d": 36, "L": 6}),
    "transformers' T5": Form(
        _of("T5Config", "T5ForConditionalGeneration", d_model=_width(), d_kv=8, num_heads=4, num_layers=2,
            d_ff=_width(2), decoder_start_token_id=0),
        TOKENS | {"d": (12, 20, 28)}, {"B": 4, "T": 31, "d": 36}),
    "transformers' ViT": Form(_vit, {"B": (2, 3, 5), **WIDER}, {"B": 7, "d": 36, "L": 6}),
    "transformers' GPT-NeoX": Form(_of("GPTNeoXConfig", "GPTNeoXForCausalLM", **ENCODER, max_position_embeddings=64),
                                   {"B": (2, 3, 5), "T": (13, 17, 19), "d": (64, 96, 128), "L": (3, 4, 5)},
                                   {"B": 4, "T": 31, "d": 160, "L": 6}),
    "transformers' Phi-3": Form(
        _of("Phi3Config", "Phi3ForCausalLM", **LLAMA, pad_token_id=0), TOKENS | {"d": (24, 40, 56), "L": (3, 4, 5)},
        {"B": 4, "T": 31, "d": 64, "L": 7}),
    "transformers' OPT": Form(
        _of("OPTConfig", "OPTForCausalLM", hidden_size=_width(), num_hidden_layers=_layers, num_attention_heads=4,
            ffn_dim=_width(4), word_embed_proj_dim=_width(), max_position_embeddings=64),
        TOKENS | WIDER, {"B": 4, "T": 31, "d": 36, "L": 6}),
    "nanoGPT": Form(_nanogpt, TOKENS | WIDER | {"V": (101, 150, 211)}, {"B": 4, "T": 31, "d": 44, "L": 6, "V": 300}),
    "a ResNet of basic blocks": Form(_resnet, {"B": (2, 3, 5), "H": (6, 7, 9), "c": (5, 8, 11), "L": (3, 4, 5)},
                                     {"B": 7, "H": 12, "c": 14, "L": 6}),
    "an LSTM of two layers": Form(_lstm, {"B": (3, 4, 5), "d": (8, 11, 14)}, {"B": 11, "d": 23}),
}  # fmt: skip
