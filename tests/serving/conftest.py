"""The folder that has ``examples``, for importing it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
