"""What all tests share."""

import gc

from hypothesis import settings

# Accounts are thousands of small objects that live on; walking them again and again took a tenth of the suite's time.
gc.set_threshold(50_000, 20, 50)

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("here", deadline=None)
settings.load_profile("here")
