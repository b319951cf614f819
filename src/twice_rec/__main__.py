"""`python -m twice_rec STAGE RECIPE`: the command `twice-rec` for launchers that start Python modules."""

import sys

from twice_rec.stages.command_line import main

if __name__ == "__main__":
    sys.exit(main())
