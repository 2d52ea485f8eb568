"""`python -m sward`, the same as the command `sward`."""

import sys

from sward.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
