"""`python -m hbmeta.cli`."""

import sys

from hbmeta.cli import main

sys.exit(main())
