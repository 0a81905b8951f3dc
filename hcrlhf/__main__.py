"""`python -m hcrlhf`."""

import sys

from hcrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
