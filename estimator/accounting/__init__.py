"""From one executed step to closed forms: the ledger, the trace, the peak and every figure."""
