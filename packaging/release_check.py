"""Checks a release and prints a table: `make release-check`, or `python packaging/release_check.py NAME ...`.

The checks read the checkout, and the sdist and the wheel that `make wheel` left in dist/. Each check is a function that
returns a summary, or raises `Failed` with the reason. The last one, `installed`, creates a fresh environment of $PYTHON
and downloads $TORCH into it.
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
# The hosts to which files of a release may link.
HOSTS = {"www.apache.org", "dmlc.github.io", "matplotlib.org"}
# Folders that are the same on every Linux, so their paths reveal nothing about the machine of the build.
EVERYWHERE = ("/bin/", "/dev/", "/lib/", "/lib64/", "/proc/", "/sys/", "/usr/bin/")
LIBRARIES = {"none": set(), "cpu": {"_C", "_thin"}, "cuda": {"_C", "_thin", "_C_cuda"}}


class Failed(Exception):
    """A check found a fault in the release."""


def output_of(*command: str, where: pathlib.Path = ROOT, **variables: str) -> str:
    """The output of a command. If the command fails, raises `Failed` with the end of the output."""
    completed = subprocess.run(command, cwd=where, env=os.environ | variables, capture_output=True, text=True)
    if completed.returncode:
        raise Failed("\n".join([" ".join(command), *(completed.stdout + completed.stderr).strip().splitlines()[-8:]]))
    return completed.stdout.strip()


def found(pattern: str, path: str) -> str:
    """The text of the one group of a pattern in a file of the checkout."""
    match = re.search(pattern, (ROOT / path).read_text())
    if match is None:
        raise Failed(f"{path} has nothing of the form {pattern}")
    return match.group(1)


def built(pattern: str) -> pathlib.Path:
    """The one file in dist/ that matches the pattern."""
    files = sorted((ROOT / "dist").glob(pattern))
    if len(files) != 1:
        raise Failed(f"expected one {pattern} in dist/, found {[path.name for path in files]}: make wheel")
    return files[0]


def contents(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel, or of an sdist with paths relative to its top folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(path) as sdist:
        for member in sdist.getmembers():
            if member.isfile():
                yield member.name.partition("/")[2], sdist.extractfile(member).read()


def metadata(path: pathlib.Path) -> email.message.Message:
    """The metadata of an sdist or a wheel."""
    name, text = next((n, d) for n, d in contents(path) if re.fullmatch(r"PKG-INFO|[^/]+\.dist-info/METADATA", n))
    return email.message_from_bytes(text)


def version() -> str:
    """The package, the changelog, the conda recipe, the tag, the sdist and the wheel have the same version."""
    name = found(r'__version__ = "(.*)"', "ckpt_kernels/version.py")
    heading = found(r"(?m)^## (.*)$", "CHANGELOG.md")
    versions = {
        "CHANGELOG.md": heading.split()[0],
        "packaging/conda/recipe.yaml": found(r'version: "(.*)"', "packaging/conda/recipe.yaml"),
        **{path.name: metadata(path)["Version"] for path in (built("*.tar.gz"), built("*.whl"))},
    }
    tags = [tag for tag in git("tag", "--points-at", "HEAD") if tag.startswith("v")]
    versions |= {f"the tag {tag}": tag.removeprefix("v") for tag in tags}
    different = {
        where: found_version for where, found_version in versions.items() if found_version.partition("+")[0] != name
    }
    if different:
        raise Failed(f"ckpt_kernels/version.py has {name}, but {different}")
    if tags and "unreleased" in heading:
        raise Failed(f"CHANGELOG.md calls {name} unreleased, and the commit is tagged")
    return f"{name}, in {len(versions) + 1} places" + (", unreleased" if "unreleased" in heading else "")


def git(*command: str) -> list[str]:
    """The lines of git's output; none outside a checkout."""
    with contextlib.suppress(Failed, FileNotFoundError):
        return output_of("git", *command).splitlines()
    return []


def sdist() -> str:
    """The sdist contains the sources, the tests and the build files of the checkout, and no built files."""
    names = {name for name, _ in contents(built("*.tar.gz"))}
    folders = ("ckpt_kernels/", "csrc/", "tests/", "tools/", "examples/", "packaging/")
    needed = {name for name in git("ls-files") if name.startswith(folders) or name.endswith((".toml", "setup.py"))}
    if needed - names:
        raise Failed(f"missing: {sorted(needed - names)[:8]}")
    if compiled := [name for name in names if name.endswith((".so", ".pyd", ".o", ".pyc"))]:
        raise Failed(f"built files: {compiled[:8]}")
    return f"{len(names)} files, {built('*.tar.gz').stat().st_size / 1e6:.1f} MB"


def sdist_tests() -> str:
    """Tests pass in the unpacked sdist with the libraries of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(built("*.tar.gz")) as archive:
            archive.extractall(folder, filter="data")
        (there,) = pathlib.Path(folder).iterdir()
        for name, data in contents(built("*.whl")):
            if name.endswith((".so", ".pyd")):
                (there / name).write_bytes(data)
        tests = ("tests/test_activations.py", "tests/test_setup.py", "tests/test_documentation.py")
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        return output_of(*command, where=there).splitlines()[-1]


def wheel() -> str:
    """The wheel contains the package with the requested libraries, and nothing else."""
    path = built("*.whl")
    names = [name for name, _ in contents(path)]
    if unexpected := [name for name in names if not re.match(r"ckpt_kernels(/|-[^/]+\.dist-info/)", name)]:
        raise Failed(f"not of the package: {unexpected[:8]}")
    libraries = {pathlib.Path(name).name.partition(".")[0] for name in names if name.endswith((".so", ".pyd"))}
    requested = os.environ.get("CKPT_KERNELS_BUILD") or ("cuda" if shutil.which("nvcc") else "cpu")
    if libraries != LIBRARIES[requested]:
        raise Failed(f"has the libraries {sorted(libraries)}; expected {sorted(LIBRARIES[requested])}")
    if libraries and "-cp310-abi3-" not in path.name:
        raise Failed(f"{path.name} is not for every Python from 3.10")
    return f"{', '.join(sorted(libraries)) or 'no library'}, {path.stat().st_size / 1e6:.1f} MB"


def places() -> str:
    """No file of sdist and wheel contains a path that exists on this machine, or a host other than `HOSTS`."""
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
    """README renders as on a package index."""
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
    return output_of("bash", "packaging/check_wheel.sh", python, torch).splitlines()[-1]


CHECKS = (version, sdist, wheel, places, readme, sdist_tests, installed)


def main(names: list[str]) -> int:
    """Run the named checks, or all, and print the result of each. Returns 1 if a check failed, else 0."""
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
