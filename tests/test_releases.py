"""packaging/release_check.py on a small correct release, and on releases with one fault each."""

import importlib.util
import io
import json
import pathlib
import re
import sys
import tarfile
import zipfile
from types import ModuleType

import pytest

from tools import docs_versions

ROOT = pathlib.Path(__file__).parent.parent
SAYS = "Metadata-Version: 2.4\nName: ckpt-kernels\nVersion: 1.2.0\nDescription-Content-Type: text/markdown\n\n# Title\n"
# Split, because this file is in a release too and must not contain the address.
ELSEWHERE = "https:" + "//index.example"
FILES = {
    "ckpt_kernels/version.py": '__version__ = "1.2.0"\n',
    "CHANGELOG.md": "# Changelog\n\n## 1.2.0 (unreleased)\n",
    "packaging/conda/recipe.yaml": 'context:\n  version: "1.2.0"\n',
}
SDIST = {"PKG-INFO": SAYS, "setup.py": "", "ckpt_kernels/version.py": FILES["ckpt_kernels/version.py"]}
WHEEL = {
    "ckpt_kernels/version.py": FILES["ckpt_kernels/version.py"],
    "ckpt_kernels/_C.abi3.so": "\0/usr/lib64/nowhere/of_this_machine.so\0see http://www.apache.org\0",
    "ckpt_kernels/_thin.abi3.so": "",
    "ckpt_kernels-1.2.0.dist-info/METADATA": SAYS,
}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "packaging" / "release_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "git", lambda *command: ["setup.py"] if command[0] == "ls-files" else [])
    monkeypatch.setenv("CKPT_KERNELS_BUILD", "cpu")
    for name, text in FILES.items():
        write(tmp_path, name, text)
    pack(tmp_path)
    return module


def write(root: pathlib.Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def pack(root: pathlib.Path, sdist: dict[str, str] = SDIST, wheel: dict[str, str] = WHEEL) -> None:
    (root / "dist").mkdir(exist_ok=True)
    with tarfile.open(root / "dist" / "ckpt_kernels-1.2.0.tar.gz", "w:gz") as archive:
        for name, text in sdist.items():
            member = tarfile.TarInfo(f"ckpt_kernels-1.2.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    with zipfile.ZipFile(root / "dist" / "ckpt_kernels-1.2.0-cp310-abi3-linux_x86_64.whl", "w") as archive:
        for name, text in wheel.items():
            archive.writestr(name, text)


def test_a_correct_release_passes(checks: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert checks.main(["version", "sdist", "wheel", "places"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "ok"] for name in ("version", "sdist", "wheel", "places")]
    assert "1.2.0, in 5 places, unreleased" in lines[0] and "_C, _thin" in lines[2]


@pytest.mark.parametrize("name", FILES)
def test_another_version_in_one_file_fails(checks: ModuleType, tmp_path: pathlib.Path, name: str) -> None:
    write(tmp_path, name, FILES[name].replace("1.2.0", "1.2.1"))
    with pytest.raises(checks.Failed, match=r"1\.2\.1"):
        checks.version()


def test_a_tag_needs_a_released_version(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "git", lambda *command: ["v1.2.0"])
    with pytest.raises(checks.Failed, match="unreleased"):
        checks.version()
    monkeypatch.setattr(checks, "git", lambda *command: ["v1.3.0"])
    with pytest.raises(checks.Failed, match=r"the tag v1\.3\.0"):
        checks.version()


@pytest.mark.parametrize(
    "check, sdist, wheel, says",
    [
        ("sdist", {name: SDIST[name] for name in SDIST if name != "setup.py"}, WHEEL, "missing.*setup.py"),
        ("sdist", SDIST | {"ckpt_kernels/_C.abi3.so": ""}, WHEEL, "built files.*_C"),
        ("wheel", SDIST, {name: WHEEL[name] for name in WHEEL if "_thin" not in name}, r"has the libraries \['_C'\]"),
        ("wheel", SDIST, WHEEL | {"tests/test_a.py": ""}, "not of the package.*tests/test_a.py"),
        ("places", SDIST | {"setup.py": f"at {sys.executable}"}, WHEEL, "setup.py: /.*python"),
        ("places", SDIST, WHEEL | {"ckpt_kernels/a.py": f"# {ELSEWHERE}/simple"}, "a.py: index.example"),
    ],
)
def test_wrong_contents_fail(
    checks: ModuleType, tmp_path: pathlib.Path, check: str, sdist: dict[str, str], wheel: dict[str, str], says: str
) -> None:
    pack(tmp_path, sdist, wheel)
    with pytest.raises(checks.Failed, match=says):
        getattr(checks, check)()


def test_a_failure_is_in_the_table(checks: ModuleType, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "dist" / "ckpt_kernels-1.2.0.tar.gz").unlink()
    assert checks.main(["sdist", "wheel"]) == 1
    out = capsys.readouterr().out
    assert "sdist        FAILED  expected one *.tar.gz in dist/" in out and "wheel        ok" in out


def test_versions_of_the_documentation(tmp_path: pathlib.Path) -> None:
    for name in ("0.9.0", "0.10.0", "dev", "0.2", "pictures", "0.3.0rc1"):
        write(tmp_path, f"{name}/index.html", "")
    (tmp_path / "1.0").mkdir()
    docs_versions.main(tmp_path)
    assert json.loads((tmp_path / "versions.json").read_text()) == ["0.10.0", "0.9.0", "0.2", "dev"]
    links = re.findall(r'href="(.*?)/"', (tmp_path / "index.html").read_text())
    assert links == ["0.10.0", "0.9.0", "0.2", "dev"]
    # The page with the list is no version.
    assert docs_versions.versions(tmp_path) == links
