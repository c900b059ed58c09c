"""The steps of the optimizers, with what keeps their weights and scales their gradients."""
