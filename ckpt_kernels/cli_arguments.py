"""Argument types of the command line, which reject impossible values before a long run starts."""

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
    """A device on which tensors can be created here."""
    try:
        result = torch.device(text)
        torch.empty(0, device=result)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device here: {str(error).splitlines()[0]}") from error
    return result


def folder(text: str) -> pathlib.Path:
    """A folder that can be written to or created."""
    path = pathlib.Path(text)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a folder, and {str(nearest)!r} is none to write to")
    return path


def file(text: str) -> pathlib.Path:
    """A file that can be written, in an existing folder."""
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; expected a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder that is there: {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def existing(text: str) -> pathlib.Path:
    """An existing file that can be read."""
    path = pathlib.Path(text)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a file that can be read")
    return path


def picture(text: str) -> pathlib.Path:
    """A file name with the ending of a supported picture format."""
    if pathlib.Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a name that ends in {', '.join(PICTURES)}")
    return file(text)
