"""The folder that has ``examples``, and ``examples`` itself, where its scripts look for ``data``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "examples")]
