"""The checks of a release, as a table: `make release-check`, or `python packaging/release_check.py NAME ...` for some.

They read the checkout and what `make wheel` left in dist/, an sdist and a wheel. Each check is a function of this file
that returns what it found, and raises `Failed` with what is wrong. The last, `installed`, makes a fresh environment and
downloads torch into it: $TORCH, by $PYTHON.
"""

import contextlib
import email
import email.message
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
# All that the files of a release may point to.
HOSTS = {"www.apache.org", "dmlc.github.io", "matplotlib.org"}
# Where every Linux has the same: none of these tells of the machine.
EVERYWHERE = ("/bin/", "/dev/", "/lib/", "/lib64/", "/proc/", "/sys/", "/usr/bin/")
LIBRARIES = {"none": set(), "cpu": {"_C", "_thin"}, "cuda": {"_C", "_thin", "_C_cuda"}}


class Failed(Exception):
    """What is wrong with a release."""


def said(*command: str, where: pathlib.Path = ROOT, **variables: str) -> str:
    """What a command prints; `Failed`, with the end of that, where the command fails."""
    done = subprocess.run(command, cwd=where, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise Failed("\n".join([" ".join(command), *(done.stdout + done.stderr).strip().splitlines()[-8:]]))
    return done.stdout.strip()


def found(pattern: str, path: str) -> str:
    """The one group of a pattern in a file of the checkout."""
    match = re.search(pattern, (ROOT / path).read_text())
    if match is None:
        raise Failed(f"{path} has nothing of the form {pattern}")
    return match.group(1)


def built(pattern: str) -> pathlib.Path:
    """The one file of that form in dist/."""
    files = sorted((ROOT / "dist").glob(pattern))
    if len(files) != 1:
        raise Failed(f"expected one {pattern} in dist/, found {[path.name for path in files]}: make wheel")
    return files[0]


def contents(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """The files of an sdist, without the folder that all are in, or of a wheel."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(path) as sdist:
        for member in sdist.getmembers():
            if member.isfile():
                yield member.name.partition("/")[2], sdist.extractfile(member).read()


def metadata(path: pathlib.Path) -> email.message.Message:
    """What an sdist or a wheel says of itself."""
    name, text = next((n, d) for n, d in contents(path) if re.fullmatch(r"PKG-INFO|[^/]+\.dist-info/METADATA", n))
    return email.message_from_bytes(text)


def version() -> str:
    """One version in the package, the changelog, the conda recipe, the tag, and what was built."""
    name = found(r'__version__ = "(.*)"', "ckpt_kernels/version.py")
    heading = found(r"(?m)^## (.*)$", "CHANGELOG.md")
    saying = {
        "CHANGELOG.md": heading.split()[0],
        "packaging/conda/recipe.yaml": found(r'version: "(.*)"', "packaging/conda/recipe.yaml"),
        **{path.name: metadata(path)["Version"] for path in (built("*.tar.gz"), built("*.whl"))},
    }
    tags = [tag for tag in git("tag", "--points-at", "HEAD") if tag.startswith("v")]
    saying |= {f"the tag {tag}": tag.removeprefix("v") for tag in tags}
    other = {where: what for where, what in saying.items() if what.partition("+")[0] != name}
    if other:
        raise Failed(f"ckpt_kernels/version.py has {name}, but {other}")
    if tags and "unreleased" in heading:
        raise Failed(f"CHANGELOG.md calls {name} unreleased, and the commit is tagged")
    return f"{name}, in {len(saying) + 1} places" + (", unreleased" if "unreleased" in heading else "")


def git(*command: str) -> list[str]:
    """The lines of what git says; none outside a checkout."""
    with contextlib.suppress(Failed, FileNotFoundError):
        return said("git", *command).splitlines()
    return []


def sdist() -> str:
    """The sdist has what the checkout has of the sources, the tests and the means to build, and nothing built."""
    names = {name for name, _ in contents(built("*.tar.gz"))}
    folders = ("ckpt_kernels/", "csrc/", "tests/", "tools/", "examples/", "packaging/")
    needed = {name for name in git("ls-files") if name.startswith(folders) or name.endswith((".toml", "setup.py"))}
    if needed - names:
        raise Failed(f"missing: {sorted(needed - names)[:8]}")
    if compiled := [name for name in names if name.endswith((".so", ".pyd", ".o", ".pyc"))]:
        raise Failed(f"built files: {compiled[:8]}")
    return f"{len(names)} files, {built('*.tar.gz').stat().st_size / 1e6:.1f} MB"


def sdist_tests() -> str:
    """Tests run where the sdist is unpacked, on the libraries of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(built("*.tar.gz")) as archive:
            archive.extractall(folder, filter="data")
        (there,) = pathlib.Path(folder).iterdir()
        for name, data in contents(built("*.whl")):
            if name.endswith((".so", ".pyd")):
                (there / name).write_bytes(data)
        tests = ("tests/test_activations.py", "tests/test_setup.py", "tests/test_documentation.py")
        return said(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, where=there).splitlines()[
            -1
        ]


def wheel() -> str:
    """The wheel has the package with the libraries that were asked for, and nothing else."""
    path = built("*.whl")
    names = [name for name, _ in contents(path)]
    if strange := [name for name in names if not re.match(r"ckpt_kernels(/|-[^/]+\.dist-info/)", name)]:
        raise Failed(f"not of the package: {strange[:8]}")
    libraries = {pathlib.Path(name).name.partition(".")[0] for name in names if name.endswith((".so", ".pyd"))}
    asked = os.environ.get("CKPT_KERNELS_BUILD") or ("cuda" if shutil.which("nvcc") else "cpu")
    if libraries != LIBRARIES[asked]:
        raise Failed(f"has the libraries {sorted(libraries)}; expected {sorted(LIBRARIES[asked])}")
    if libraries and "-cp310-abi3-" not in path.name:
        raise Failed(f"{path.name} is not for every Python from 3.10")
    return f"{', '.join(sorted(libraries)) or 'no library'}, {path.stat().st_size / 1e6:.1f} MB"


def places() -> str:
    """No path that is there on this machine, and no host but those that are meant, in any file of sdist and wheel."""
    wrong, count = set(), 0
    for archive in (built("*.tar.gz"), built("*.whl")):
        for name, data in contents(archive):
            count += 1
            hosts = {host.decode() for host in re.findall(rb"https?://([\w.-]+\w)", data)}
            paths = {path.decode() for path in re.findall(rb"(?<![\w.~*)}>\]/-])(?:/[\w.+-]+){2,}", data)}
            wrong |= {f"{name}: {host}" for host in hosts - HOSTS}
            wrong |= {f"{name}: {p}" for p in paths if not f"{p}/".startswith(EVERYWHERE) and pathlib.Path(p).exists()}
    if wrong:
        raise Failed("\n".join(sorted(wrong)[:8]))
    return f"{count} files"


def readme() -> str:
    """README renders as an index shows it."""
    from readme_renderer import markdown

    text = metadata(built("*.whl"))
    if text["Description-Content-Type"] != "text/markdown":
        raise Failed(f"the wheel's description is {text['Description-Content-Type']}; expected text/markdown")
    page = markdown.render(text.get_payload())
    if not page or "<h1" not in page:
        raise Failed("it does not render")
    return f"{len(page)} characters of HTML"


def installed() -> str:
    """The wheel works in a fresh environment."""
    python, torch = os.environ.get("PYTHON", sys.executable), os.environ["TORCH"]
    return said("bash", "packaging/check_wheel.sh", python, torch).splitlines()[-1]


CHECKS = (version, sdist, wheel, places, readme, sdist_tests, installed)


def main(names: list[str]) -> int:
    """Runs the checks named, or all, and prints a line for each; 1 where one fails."""
    failed = False
    for check in CHECKS:
        if names and check.__name__ not in names:
            continue
        try:
            result, text = "ok", check()
        except Exception as error:
            failed, result, text = True, "FAILED", str(error) if isinstance(error, Failed) else repr(error)
        first, *more = text.splitlines() or [""]
        print(f"{check.__name__:<12} {result:<7} {first}", *(f"{'':<21}{line}" for line in more), sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
