"""The model, its loss and generation."""
