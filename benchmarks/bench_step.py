"""A training step of the trainer against the same model in plain torch: torch.nn's modules, loss and optimizer.

    python benchmarks/bench_step.py [--repeats 7] [--shapes small medium]

The shapes are nanoGPT's: 6 x 384, 6 heads, batch 12, and 12 x 768, 12 heads, batch 4, both with context 256 and a
vocabulary of 50304. Ours is the bundled model with attention "sdpa", our cross entropy and our AdamW; theirs is written
below. Both hold the same weights and take the same tokens, by turns in one run; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import gc

import torch
from alternate import alternate, report
from torch import nn
from torch.nn import functional as F

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.model.decoder import build_model
from trainer.model.loss import cross_entropy
from trainer.optim.optimizers import AdamW

SHAPES = {"small": (6, 384, 6, 12), "medium": (12, 768, 12, 4)}  # layers, width, heads, batch
CONTEXT = 256
VOCABULARY = 50304


class Block(nn.Module):
    """GPT-2's block as most would write it."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x):
        """(B, T, d) -> (B, T, d)."""
        B, T, d = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(d, dim=2)
        q, k, v = (t.view(B, T, self.heads, d // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, d))
        return x + self.down(self.gelu(self.up(self.ffn_norm(x))))


class Plain(nn.Module):
    """GPT-2 in torch.nn's modules, with the tied head."""

    def __init__(self, layers, d, heads):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, d), nn.Embedding(CONTEXT, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        """(B, T) -> (B, T, V)."""
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def same_weights(plain, ours):
    """Copy by position: both register their modules in the order of the forward pass."""
    pairs = list(zip(plain.parameters(), by_plain_order(ours), strict=True))
    with torch.no_grad():
        for p, q in pairs:
            p.copy_(q)


def by_plain_order(ours):
    yield from (ours.embedding.weight, ours.positions.weight)
    for b in ours.blocks:
        modules = (b.attention_norm, b.ffn_norm, b.attention.qkv, b.attention.out, b.ffn.up, b.ffn.down)
        yield from (p for module in modules for p in (module.weight, module.bias))
    yield from ours.final_norm.parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.shapes:
        compare(name, arguments.repeats)
        gc.collect()


def compare(name, repeats):
    layers, d, heads, batch = SHAPES[name]
    torch.manual_seed(0)
    m = ModelConfig("gpt2", layers, d, heads, VOCABULARY, CONTEXT)
    ours = build_model(m, Plan(batch_size=batch, attention="sdpa"))
    plain = Plain(layers, d, heads)
    same_weights(plain, ours)
    ids, targets = (torch.randint(VOCABULARY, (batch, CONTEXT)) for _ in range(2))
    optimizers = {"plain torch": torch.optim.AdamW(plain.parameters(), lr=1e-3), "trainer": AdamW(ours.parameters())}
    losses = {}

    def plain_step():
        logits = plain(ids)
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))
        loss.backward()
        optimizers["plain torch"].step()
        optimizers["plain torch"].zero_grad(set_to_none=True)
        losses["plain torch"] = loss.item()

    def our_step():
        loss = cross_entropy(ours(ids), targets)
        loss.backward()
        optimizers["trainer"].step()
        optimizers["trainer"].zero_grad(set_to_none=True)
        losses["trainer"] = loss.item()

    print(f"{name}: {layers} x {d}, {heads} heads, batch {batch} x {CONTEXT}, vocabulary {VOCABULARY}")
    report(alternate({"plain torch": plain_step, "trainer": our_step}, repeats), base="plain torch")
    print(f"losses after {repeats + 1} steps: {losses['plain torch']:.4f} plain, {losses['trainer']:.4f} trainer\n")


if __name__ == "__main__":
    main()
