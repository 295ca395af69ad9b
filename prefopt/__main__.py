"""`python -m prefopt` is the command `prefopt`."""

import sys

from prefopt.cli import main

sys.exit(main())
