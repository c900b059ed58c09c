"""Real steps, measured and held against the estimates."""
