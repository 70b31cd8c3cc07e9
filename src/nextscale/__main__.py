"""`python -m nextscale`."""

import sys

if __name__ == "__main__":
    try:
        from nextscale.cli.main import main
    except KeyboardInterrupt:  # Ctrl-C while that is imported
        sys.exit(130)
    sys.exit(main())
