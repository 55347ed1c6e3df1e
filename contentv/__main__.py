"""`python -m contentv COMMAND ...` is the console script `contentv COMMAND ...`."""

import sys

from contentv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
