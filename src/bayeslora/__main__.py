"""``python -m bayeslora`` is the command line."""

import sys

from bayeslora.cli import main

sys.exit(main())
