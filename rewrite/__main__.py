"""`python -m rewrite` is the command line `rewrite`."""

import sys

from rewrite.cli import main

if __name__ == "__main__":
    sys.exit(main())
