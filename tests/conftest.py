"""What all tests share."""

import gc

# Accounts are thousands of small objects that live on; walking them again and again took a tenth of the suite's time.
gc.set_threshold(50_000, 20, 50)
