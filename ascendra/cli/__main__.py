"""`python -m ascendra.cli`: the same as `ascendra`."""

import sys

from ascendra.cli import main

sys.exit(main())
