"""The modules, sizes and recipes at which `tools/check_recorder.py` holds the recorder against real steps."""

from __future__ import annotations

import json
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import estimator as est
from estimator.describe.plan import Plan
from trainer.referee.measure import build_parts, loss_of
from trainer.referee.recorder.builds import of_config
from trainer.referee.recorder.remedies import checkpointed

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
SIZES = ((2, 40), (3, 24), (1, 63))  # sequences, and tokens of each
TOKENS = {"vocab_size": 200}
ENCODER = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SEQUENCES = {
    **TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
IMAGES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
}
# Beside the decoders of tests/data/hf/tiny.jsonl: (class, fields of its config.json).
OTHERS = {
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "t5": ("T5ForConditionalGeneration", {**TOKENS, "d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2,
                                          "d_ff": 96, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {**SEQUENCES, "max_position_embeddings": 128}),
    "whisper": ("WhisperForConditionalGeneration", {**SEQUENCES, "max_source_positions": 60, "num_mel_bins": 16,
                                                    "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1,
                                                    "eos_token_id": 2, "decoder_start_token_id": 1}),
    "mamba": ("MambaForCausalLM", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "vit": ("ViTForImageClassification", {**IMAGES, "patch_size": 8}),
    "swin": ("SwinForImageClassification", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32,
                                            "window_size": 4, "patch_size": 2}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                                                "layer_type": "basic", "image_size": 32}),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2,
                                                    "image_size": 32}),
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    "adamw, loop": {"optimizer_impl": "loop"},
    "adamw, foreach": {"optimizer_impl": "foreach"},
    "adamw, fused": {"optimizer_impl": "fused"},
    "sgd": {"optimizer": "sgd"},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "two micro-batches": {"grad_accumulation": 2},
    "clipping": {"max_grad_norm": 1.0},
    "autocast": {"precision": "bf16-mixed"},
    "checkpoints": {},
}
CHECKPOINTS = "checkpoints"
WITHOUT_CHECKPOINTS = ("resnet", "convnext")  # transformers' classes that have none of their own
# These have the first recipe at every size, and every recipe at the first size; the others have the first recipe at the
# first size, and at each further size another one, by turns.
EVERY_RECIPE = (
    *("bert", "t5", "vit", "whisper", "resnet", "gpt2", "llama", "qwen3"),
    *("own gpt2", "own llama", "nanogpt", "lstm", "unet"),
)


class Skips(nn.Module):
    """Convolutions down and up again, with a skip, normalised by groups and by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(4, 32)
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.out = nn.Conv2d(48, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to the same."""
        skip = F.silu(self.norm(self.into(x)))
        low = self.up(F.relu(self.group(self.down(skip))))
        return self.out(torch.cat([skip, low], dim=1))


class Tagger(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(200, 24), nn.LSTM(24, 32, num_layers=2, batch_first=True)
        self.out = nn.Linear(32, 200)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, V)."""
        return self.out(self.lstm(self.embedding(ids))[0])


class Block(nn.Module):
    """nanoGPT's: attention by `scaled_dot_product_attention`, four times the width in between, dropout in three places.

    The statements of github.com/karpathy/nanoGPT, model.py, written down again.
    """

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.gelu, self.c_out = nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) to the same."""
        B, T, C = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=self.dropout, is_causal=True)
        x = x + self.drop(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))
        return x + self.drop(self.c_out(self.gelu(self.c_fc(self.ln_2(x)))))


class NanoGPT(nn.Module):
    """Its model, with the head tied to the embedding."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(200, 64), nn.Embedding(64, 64), nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(64, 4, dropout) for _ in range(3))
        self.ln_f, self.lm_head = nn.LayerNorm(64), nn.Linear(64, 200, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, T), (B, T) -> ()."""
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def _written(name: str, B: int, T: int) -> Any:
    torch.manual_seed(0)
    match name:
        case "nanogpt":
            ids = torch.randint(200, (B, T))
            return NanoGPT(), lambda module, ids: module(ids, ids), (ids,)
        case "lstm":
            ids = torch.randint(200, (B, T))
            return Tagger(), lambda module, ids: F.cross_entropy(module(ids).flatten(0, 1), ids.flatten()), (ids,)
        case _:
            images = torch.rand(B, 3, 32, 2 * (T // 2))
            return Skips(), lambda module, x: (module(x) - x).square().mean(), (images,)


def _own(family: str, B: int, T: int) -> Any:
    """Our own model, as a module with a loss."""
    m = est.ModelConfig(family=family, num_layers=2, d_model=64, num_heads=4, d_ff=96, vocab_size=200, context_length=T)
    p = Plan(batch_size=B, precision="fp32")
    model, inputs = build_parts(m, p, "cpu", 0)
    return model, lambda module, ids, targets: loss_of(module, p, ids, targets), inputs


@cache
def configurations() -> dict[str, dict[str, Any]]:
    """config.json of each of transformers' classes, by its name here."""
    found: dict[str, dict[str, Any]] = {
        name: {"model_type": name, "architectures": [architecture], **sizes}
        for name, (architecture, sizes) in OTHERS.items()
    }
    for line in (ROOT / "tests/data/hf/tiny.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        found[case["name"].removeprefix("tiny ")] = case["config"]
    return found


def names() -> list[str]:
    """All modules; those that have every recipe first."""
    return [*EVERY_RECIPE, *(x for x in configurations() if x not in EVERY_RECIPE)]


def _checkpointed(build: Callable[[], Any]) -> Any:
    """The same with PyTorch's checkpoints around blocks, or around the module where it has none."""
    module, loss, inputs = build()
    blocks = next((m for m in module.modules() if isinstance(m, nn.ModuleList)), None)
    for block in [module] if blocks is None else list(blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return module, loss, inputs


def builder(name: str, B: int, T: int) -> Callable[[], Any]:
    """What builds the module, its loss and inputs."""
    if name in ("nanogpt", "lstm", "unet"):
        return partial(_written, name, B, T)
    if name.startswith("own "):
        return partial(_own, name.removeprefix("own "), B, T)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(configurations()[name]), encoding="utf-8")
        return of_config(path, B, T)


def prepared(name: str, size: tuple[int, int], recipe: str) -> tuple[Callable[[], Any], Plan]:
    """(what builds the step's module, its plan)."""
    build = builder(name, *size)
    if recipe == CHECKPOINTS:
        own = name in configurations() and name not in WITHOUT_CHECKPOINTS
        build = checkpointed(build) if own else partial(_checkpointed, build)
    return build, Plan(**RECIPES[recipe])


def table() -> list[tuple[str, tuple[int, int], str]]:
    """Every (module, size, recipe) that is compared."""
    recipes = list(RECIPES)
    found = []
    for i, name in enumerate(names()):
        if name in EVERY_RECIPE:
            found += [(name, size, recipes[0]) for size in SIZES]
            found += [(name, SIZES[0], recipe) for recipe in recipes[1:]]
        else:
            found.append((name, SIZES[0], recipes[0]))
            found += [(name, SIZES[1], recipes[1 + i % 9]), (name, SIZES[2], recipes[1 + (i + 4) % 9])]
    return found
