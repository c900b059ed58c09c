"""What any module's training step does to memory: PyTorch itself runs it on meta tensors, and is recorded."""
