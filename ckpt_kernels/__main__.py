"""`python -m ckpt_kernels`: the command `ckpt-kernels`, also where scripts are not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
