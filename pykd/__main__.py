"""``python -m pykd``, and the program ``pykd``; see :mod:`pykd.command_line`."""

import sys

from pykd.command_line import main

if __name__ == "__main__":
    sys.exit(main())
