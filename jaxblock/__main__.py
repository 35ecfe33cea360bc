"""Makes ``python -m jaxblock`` the same as ``jaxblock``."""

import sys

from jaxblock.cli import main

if __name__ == "__main__":
    sys.exit(main())
