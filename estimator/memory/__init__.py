"""What a device adds to live tensors: the allocator, the context, the lines of a card."""
