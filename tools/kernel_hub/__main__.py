"""``python tools/kernel_hub --out FOLDER``: writes the repository of the kernel."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package of this checkout, installed or not
sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_hub.build import write_kernel


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/kernel_hub", description="Write the library as a repository for Hugging Face's Kernel Hub."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a kernel that is there is replaced")
    parser.add_argument(
        "--repo-id", default="ctkernels/ctkernels", help="where it will be uploaded (default: %(default)s)"
    )
    parser.add_argument(
        "--version", type=int, default=0, help="of the kernel: the branch vN; 0 is a preview (default: 0)"
    )
    options = parser.parse_args()
    try:
        ids = write_kernel(options.out, options.repo_id, options.version)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{options.out}: {', '.join(ids)}")


if __name__ == "__main__":
    main()
