"""``python -m beavervision``: the command line."""

import sys

from beavervision.cli import main

if __name__ == "__main__":
    sys.exit(main())
