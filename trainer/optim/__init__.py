"""Optimizers, precision, clipping and schedules."""
