"""Accelerators, their links and clusters: data with sources."""
