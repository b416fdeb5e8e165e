"""Kinds of arguments of the command line: what cannot work is refused before a long run, not after it."""

import argparse
import os
import pathlib

PICTURES = (".png", ".svg", ".pdf")


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a whole number from {least}")
    return number


def file(text: str) -> pathlib.Path:
    """A file that can be written, in a folder that is there."""
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; expected a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder that is there: {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def picture(text: str) -> pathlib.Path:
    """A file whose ending names a format that is drawn."""
    if pathlib.Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a name that ends in {', '.join(PICTURES)}")
    return file(text)
