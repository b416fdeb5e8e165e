"""Writes the first page of a documentation site with a folder for each version: `python -m tools.docs_versions SITE`.

Writes `SITE/index.html`, a list of the folders with the newest version first, and `SITE/versions.json`, the same for
programs. The versions are the folders with a name like `0.1.0`, and `dev` for the current sources; other folders are
ignored.
"""

import json
import pathlib
import re
import sys

DEVELOPMENT = "dev"


def versions(site: pathlib.Path) -> list[str]:
    """The names of a site's versions, the newest first, and the unreleased version at the end."""
    names = [path.parent.name for path in site.glob("*/index.html")]
    released = [name for name in names if re.fullmatch(r"\d+(\.\d+)*", name)]
    released.sort(key=lambda name: tuple(map(int, name.split("."))), reverse=True)
    return released + [DEVELOPMENT] * (DEVELOPMENT in names)


def page(names: list[str]) -> str:
    """The list of these versions as HTML."""
    items = "\n".join(f'<li><a href="{name}/">{name}</a></li>' for name in names)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>ckpt_kernels</title>\n'
        f"<h1>ckpt_kernels</h1>\n<p>Documentation, by version:</p>\n<ul>\n{items}\n</ul>\n</html>\n"
    )


def main(site: pathlib.Path) -> None:
    names = versions(site)
    (site / "index.html").write_text(page(names))
    (site / "versions.json").write_text(json.dumps(names) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
