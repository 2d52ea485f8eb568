"""Run the `sward` command line as `python -m sward`."""

import sys

from sward.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
