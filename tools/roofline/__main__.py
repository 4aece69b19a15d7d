"""``python -m roofline``."""

import sys

from .predict import main

sys.exit(main())
