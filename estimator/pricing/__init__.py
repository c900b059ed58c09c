"""Money and energy, plans of runs, and the conventions in which FLOPs are reported."""
