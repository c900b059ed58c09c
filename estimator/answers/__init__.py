"""Questions that people ask: an estimate, what would make it fit, sweeps, the formulas behind a figure."""
