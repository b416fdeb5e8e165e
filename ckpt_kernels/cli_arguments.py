"""Kinds of arguments of the command line: what cannot work is refused before a long run, not after it."""

import argparse
import os
import pathlib

import torch

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


def amount(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a number above 0")
    return number


def device(text: str) -> torch.device:
    """One that tensors can be on here."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device here: {str(error).splitlines()[0]}") from error
    return found


def folder(text: str) -> pathlib.Path:
    """A folder that can be written to, or that can be made."""
    path = pathlib.Path(text)
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a folder, and {str(there)!r} is none to write to")
    return path


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


def existing(text: str) -> pathlib.Path:
    """A file that is there to be read."""
    path = pathlib.Path(text)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a file that can be read")
    return path


def picture(text: str) -> pathlib.Path:
    """A file whose ending names a format that is drawn."""
    if pathlib.Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a name that ends in {', '.join(PICTURES)}")
    return file(text)
