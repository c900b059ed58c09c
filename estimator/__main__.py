"""`python -m estimator` is `estimate`."""

import sys

from estimator.show.commands import main

if __name__ == "__main__":
    sys.exit(main())
