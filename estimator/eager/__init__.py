"""A symbolic replica of PyTorch's eager execution: it runs a training step and writes down what happens.

`sizes` are monomials in the legend's letters, `tensor` has storages with explicit owners, `ops` declares each operator
once, `autograd` saves and releases as PyTorch's engine does, `ledger` is what a run leaves behind.
"""
