"""Draws the pictures of a folder of results again, from the figures in the folder.

python -m benchmarks.redraw benchmarks/results/cpu
"""

import argparse
import json
import pathlib

from . import layers, models, report, sweep
from .survey import report as survey

NAMES = ("results", "layers", "models", "sweep", "survey")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redraw", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="with " + ", ".join(f"{name}.json" for name in NAMES))
    folder = parser.parse_args().folder
    try:
        found = {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    about = {name: measured["machine"] for name, measured in found.items()}
    results = {name: measured["results"] for name, measured in found.items()}
    report.draw(folder, about["results"], results["results"])
    layers.draw(results["layers"], folder / "layers.png", about["layers"])
    layers.draw_overview(results["layers"], folder / "overview.png", about["layers"])
    models.draw(results["models"], folder / "models.png", about["models"])
    sweep.draw(results["sweep"], folder / "sweep.png", about["sweep"])
    survey.picture(folder / "survey.png", results["survey"], about["survey"])


if __name__ == "__main__":
    main()
