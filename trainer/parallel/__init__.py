"""Several processes: DDP, ZeRO and FSDP."""
