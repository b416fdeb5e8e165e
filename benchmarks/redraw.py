"""The pictures of a folder of results, drawn again from the figures in it.

python -m benchmarks.redraw benchmarks/results/cpu
"""

import argparse
import json
import pathlib

from . import layers, models, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redraw", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="with results.json, layers.json and models.json")
    folder = parser.parse_args().folder
    try:
        found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("results", "layers", "models")}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    about = {name: measured["machine"] for name, measured in found.items()}
    results = {name: measured["results"] for name, measured in found.items()}
    report.draw(folder, about["results"], results["results"])
    layers.draw(results["layers"], folder / "layers.png", about["layers"])
    layers.draw_overview(results["layers"], folder / "overview.png", about["layers"])
    models.draw(results["models"], folder / "models.png", about["models"])


if __name__ == "__main__":
    main()
