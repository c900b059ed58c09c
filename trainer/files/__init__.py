"""What is read and written: token files and checkpoints."""
