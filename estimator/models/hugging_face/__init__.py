"""Decoders as the classes of transformers run them, statement by statement; what each does otherwise is its `Written`.

Names of a frame are the locals of the class's own forward.
"""
