"""`python -m isthmus.apps.cli` is `isthmus`."""

import sys

from isthmus.apps.cli.main import main

sys.exit(main())
