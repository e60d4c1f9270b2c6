"""`python -m qingtune` is the command `qingtune`."""

import sys

from qingtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
