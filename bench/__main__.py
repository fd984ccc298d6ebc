"""`python -m errata.bench`: the command line, where the `errata` script is not on the path."""

import sys

from errata.bench.cli.main import main

sys.exit(main())
