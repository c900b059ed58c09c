"""A symbolic replica of PyTorch's eager execution: letters, tensors, autograd and the ledger that a step writes."""
