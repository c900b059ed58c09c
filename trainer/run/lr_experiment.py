"""The learning-rate question of the seed notes, answered: what does the loss do at 1, 1e1, 1e2 and 1e3?

The toy is the mean of the squares of 10 x 10 weights, drawn as 5 * randn. Its gradient is 2 w / 100, so step t of the
decaying SGD multiplies every weight by 1 - lr / (50 sqrt(t + 1)) and the answer can be read off: at 1 and 1e1 the
factor stays in (0, 1), nearer to 0 at 1e1; at 1e2 it starts at -1 and passes through 0; at 1e3 it starts at -19.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from trainer.optim.optimizers import SGD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LEARNING_RATES = (1.0, 1e1, 1e2, 1e3)
STEPS = 10
SEED = 0
MARKS = "abcd"  # one a learning rate, in the plot
PLOT_ROWS = 16
PLOT_COLUMNS = 6  # a step


def run(lr: float, steps: int = STEPS, seed: int = SEED) -> list[float]:
    """The loss before each of `steps` steps, and after the last: steps + 1 numbers."""
    weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)))
    optimizer = SGD([weights], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weights**2).mean()
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        optimizer.step()
    return [*losses, (weights.detach() ** 2).mean().item()]


def verdict(losses: Sequence[float]) -> str:
    """What becomes of the loss: "diverges", "decays slowly" (keeps over half), "decays", "decays fast" (under 1 %)."""
    if not losses[-1] <= losses[0]:
        return "diverges"
    kept = losses[-1] / losses[0]
    return "decays slowly" if kept > 0.5 else "decays" if kept > 0.01 else "decays fast"


def plot(curves: Mapping[str, Sequence[float]]) -> str:
    """log10 of each curve over its steps as text; a curve's name is its mark, `*` where two meet."""
    exponents = {name: [math.log10(max(y, 1e-45)) for y in ys] for name, ys in curves.items()}  # least float32 above 0
    low = min(min(ys) for ys in exponents.values())
    high = max(max(ys) for ys in exponents.values())
    steps = max(len(ys) for ys in exponents.values())
    grid = [[" "] * (PLOT_COLUMNS * (steps - 1) + 1) for _ in range(PLOT_ROWS)]
    for name, ys in exponents.items():
        for step, y in enumerate(ys):
            row = round((high - y) / ((high - low) or 1.0) * (PLOT_ROWS - 1))
            cell = grid[row][PLOT_COLUMNS * step]
            grid[row][PLOT_COLUMNS * step] = name if cell == " " else "*"
    lines = []
    for row, cells in enumerate(grid):
        exponent = round(high - row * (high - low) / (PLOT_ROWS - 1))
        lines.append(f"1e{exponent:+03d} |" + "".join(cells).rstrip())
    lines.append("      +" + "-" * len(grid[0]))
    lines.append("step   " + "".join(f"{step:<{PLOT_COLUMNS}}" for step in range(steps)).rstrip())
    return "\n".join(lines)


def main() -> None:
    """Print the losses, the verdicts and the plot."""
    curves = {mark: run(lr) for mark, lr in zip(MARKS, LEARNING_RATES, strict=True)}
    table = Table(title=f"Mean of squares under SGD with step lr / sqrt(t + 1), {STEPS} steps, seed {SEED}")
    for heading in ("", "lr", *(f"t = {t}" for t in (0, 1, 2, 5, STEPS)), "the loss"):
        table.add_column(heading, justify="right")
    for (mark, losses), lr in zip(curves.items(), LEARNING_RATES, strict=True):
        table.add_row(mark, f"{lr:g}", *(f"{losses[t]:.3g}" for t in (0, 1, 2, 5, STEPS)), verdict(losses))
    console = Console()
    console.print(table)
    console.print(plot(curves), highlight=False, markup=False)
