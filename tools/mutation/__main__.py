"""``python -m mutation``."""

import sys

from .harness import main

sys.exit(main())
