"""`python -m echod` is the same command as `echod`."""

import sys

from echod.cli import main

sys.exit(main())
