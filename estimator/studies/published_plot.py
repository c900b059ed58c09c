"""The predicted against the measured tokens per second of published runs, as a picture."""

from __future__ import annotations

from xml.sax.saxutils import escape

import numpy as np

from estimator.studies.published import judged
from estimator.studies.runs import NAMES

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 660, 480, 84, 48, 36
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")


def plot() -> str:
    """Predicted against measured tokens per second as SVG, both axes logarithmic, one colour a source's name."""
    found = judged()
    values = [x for j in found for x in (j.run.measured, j.predicted)]
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))

    def x(tokens: float) -> float:
        return LEFT + (np.log10(tokens) - low) / (high - low) * (WIDTH - LEFT - MARGIN)

    def y(tokens: float) -> float:
        return HEIGHT - BOTTOM - (np.log10(tokens) - low) / (high - low) * (HEIGHT - BOTTOM - MARGIN)

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    least, most = 10**low, 10**high
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}><title>Predicted against measured tokens per second</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(int(low), int(high) + 1):
        at = 10.0**power
        grid = 'stroke="#dddddd"'
        parts += [line(x(at), y(least), x(at), y(most), grid), line(x(least), y(at), x(most), y(at), grid)]
        parts.append(f'<text x="{x(at):.1f}" y="{y(least) + 18:.1f}" text-anchor="middle">{at:,.0f}</text>')
        parts.append(f'<text x="{x(least) - 6:.1f}" y="{y(at) + 4:.1f}" text-anchor="end">{at:,.0f}</text>')
    parts.append(line(x(least), y(least), x(most), y(most), 'stroke="black"'))
    for factor in (0.8, 1.25):
        ends = (max(least, least / factor), min(most, most / factor))
        dashed = 'stroke="#888888" stroke-dasharray="4 4"'
        parts.append(line(x(ends[0]), y(ends[0] * factor), x(ends[1]), y(ends[1] * factor), dashed))
    colour = dict(zip(dict.fromkeys(NAMES.values()), COLOURS, strict=False))
    for j in found:
        text = f"{j.run.row['model']} on {j.run.accelerator}: {j.run.measured:,.0f}, predicted {j.predicted:,.0f}"
        fill = colour[NAMES[j.run.source]]
        parts.append(
            f'<circle cx="{x(j.run.measured):.1f}" cy="{y(j.predicted):.1f}" r="3.5" fill="{fill}" '
            f'fill-opacity="0.6"><title>{escape(text)}</title></circle>'
        )
    for turn, name in enumerate(colour):
        at_y = MARGIN + 18 + 18 * turn
        parts.append(f'<circle cx="{LEFT + 16}" cy="{at_y - 4}" r="4" fill="{colour[name]}"/>')
        parts.append(f'<text x="{LEFT + 26}" y="{at_y}">{escape(name)}</text>')
    middle = (LEFT + WIDTH - MARGIN) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">measured, tokens/s of one accelerator</text>'
    )
    up = (HEIGHT - BOTTOM + MARGIN) / 2
    parts.append(
        f'<text transform="translate(12 {up}) rotate(-90)" text-anchor="middle">predicted (dashed: 25 %)</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
