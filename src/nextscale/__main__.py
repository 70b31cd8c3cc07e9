"""`python -m nextscale`."""

import sys

from nextscale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
