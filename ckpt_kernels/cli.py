"""The command `ckpt-kernels`."""

import argparse
import sys
from collections.abc import Sequence

from . import doctor
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ckpt-kernels", description="Tools for the ckpt_kernels package.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="which backend serves CPU and CUDA calls, and why the others do not; exit status 1 if not well"
    )
    parser.parse_args(arguments)
    text, well = doctor.report()
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
