"""Seconds of a step: kernels, what they reach, messages, and the time of a run."""
