"""Builds the compiled libraries: `_C` and `_thin` wherever a C++ compiler is, `_C_cuda` wherever nvcc is.

CKPT_KERNELS_BUILD=none|cpu|cuda forces what is built ("cuda" is both); forced, a failure stops the build, left
alone it is a warning, and the package works without that library. CKPT_KERNELS_VERSION_SUFFIX=+name gives what is
built a local version. The compiler is GCC or clang, on Windows clang-cl, or what CXX names. `_C` and `_C_cuda` use
torch's stable ABI and nothing of Python's C API, `_thin` the limited API of Python and nothing of torch's, so one build
serves every Python >= 3.10 and every torch >= 2.11.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

from setuptools import setup
from setuptools.command.build_py import build_py

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
WINDOWS = sys.platform == "win32"
DEFINES = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA"]
# Rounding and NaN stay as written; what is given up is errno, floating-point traps and the sign of zero.
MATH = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
# By this variable whoever packages asks for the same bytes each time.
REPRODUCIBLE = "SOURCE_DATE_EPOCH" in os.environ
# Error messages name their source file; wherever that lay when it was compiled, the library is the same.
PATH_MAP = f"-ffile-prefix-map={pathlib.Path(__file__).resolve().parent}=."
# The table of local symbols holds names of nvcc's temporary files. A library of Windows has no such table.
STRIP = {"darwin": ["-Wl,-x"], "win32": []}.get(sys.platform, ["-Wl,-s"])
# For tests: a CPU library that stops at the first bad access or undefined operation. With -O3 the vector code takes the
# compiler too long.
SANITIZE = (
    ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
    if os.environ.get("CKPT_KERNELS_SANITIZE") == "1"
    else []
)


def wanted() -> str:
    """What CKPT_KERNELS_BUILD asks for: none, cpu, cuda, or auto where it is not set."""
    value = os.environ.get("CKPT_KERNELS_BUILD", "") or "auto"
    if value not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"CKPT_KERNELS_BUILD is {value!r}; expected none, cpu or cuda")
    return value


def version() -> str:
    """That of `ckpt_kernels/version.py`, and CKPT_KERNELS_VERSION_SUFFIX ("+cu130") after it."""
    text = pathlib.Path("ckpt_kernels", "version.py").read_text()
    return re.search(r'__version__ = "(.*)"', text).group(1) + os.environ.get("CKPT_KERNELS_VERSION_SUFFIX", "")


class BuildPython(build_py):
    """What is built says the version it was built as; the source, and an editable install of it, says its own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            built = pathlib.Path(self.build_lib, "ckpt_kernels", "version.py")
            built.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version()}"', built.read_text()))


def compiler() -> str | None:
    """What CXX names, or the usual one. On Windows that is clang-cl: Microsoft's own does not know vectors as types."""
    usual, otherwise = ("clang-cl", "clang-cl") if WINDOWS else ("c++", "g++")
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or usual) or shutil.which(otherwise)


def is_gcc() -> bool:
    """Whether the compiler is GCC, and not one that takes its options (clang also goes by the name of c++)."""
    printed = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in printed


def cxx_flags() -> list[str]:
    """What C++ sources are compiled with."""
    flags = [
        *(SANITIZE or ["-O3", "-g0"]),
        "-fvisibility=hidden",
        PATH_MAP,
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        *DEFINES,
        *MATH,
    ]
    if is_gcc():
        # GCC 12 warns of its own intrinsics headers.
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    # torch looks for the standard in the words of the system's own compiler, and would add another.
    return ["/std:c++17", *(f"/clang:{flag}" for flag in flags)] if WINDOWS else ["-std=c++17", *flags]


def compiler_runtime() -> dict[str, list[str]]:
    """The library that has what clang asks the processor by, where the linker, Microsoft's, does not look for it."""
    if not WINDOWS:
        return {}
    printed = subprocess.run([compiler(), "-print-resource-dir"], capture_output=True, text=True, check=True).stdout
    folder = pathlib.Path(printed.strip(), "lib", "windows")
    return {"library_dirs": [str(folder)], "libraries": ["clang_rt.builtins-x86_64"]}


def cpp_extension():
    """torch's part of the build; the process ends with what to install where torch is not there, or is broken."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # OSError, say, of a library that is not there
        missing = isinstance(error, ModuleNotFoundError)
        sys.exit(
            "ckpt_kernels is compiled against torch, which cannot be imported here "
            f"({type(error).__name__}: {error}).\n"
            f"Install it {'first' if missing else 'again'}: pip install {'' if missing else '--force-reinstall '}"
            "'torch>=2.11' ninja 'setuptools>=77'\n"
            "Or build without the compiled libraries: CKPT_KERNELS_BUILD=none pip install ..."
        )
    return cpp_extension


def cuda_home() -> pathlib.Path | None:
    """The toolkit that nvcc belongs to, wherever nvcc itself, or a wrapper of it, lies."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (pathlib.Path(home) / "bin" / "nvcc").exists():
            return pathlib.Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    printed = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(\S+)", printed)
    return pathlib.Path(found.group(1)).resolve() if found else None


def extensions(build: str) -> list:
    if build == "none":
        return []
    if compiler() is None:
        if build != "auto":
            sys.exit(f"CKPT_KERNELS_BUILD is {build!r}, but no C++ compiler was found")
        warnings.warn("no C++ compiler was found: building without the compiled libraries", stacklevel=1)
        return []
    torch_build = cpp_extension()

    def extension(name: str, folder: str, suffix: str, flags: dict, link: list | None = None, **options: list):
        return torch_build.CppExtension(
            f"ckpt_kernels.{name}",
            sorted(str(path) for path in pathlib.Path("csrc", folder).glob(f"*.{suffix}")),
            depends=sorted(str(path) for path in pathlib.Path("csrc").rglob("*.*")),
            extra_compile_args=flags,
            extra_link_args=(STRIP if REPRODUCIBLE else []) + SANITIZE + (link or []),
            py_limited_api=True,
            **options,
        )

    if WINDOWS:
        os.environ.setdefault("CXX", "clang-cl")  # read by torch's part of the build
    flags = {"cxx": cxx_flags()}
    found = [
        extension("_C", "cpu", "cpp", flags, export_symbols=["ckpt_kernels_find_call"], **compiler_runtime()),
        extension("_thin", "thin", "cpp", flags, export_symbols=["PyInit__thin"]),
    ]
    home = cuda_home()
    if build == "cuda" and home is None:
        sys.exit("CKPT_KERNELS_BUILD is 'cuda', but nvcc was not found")
    if home is not None and build != "cpu":
        torch_build.CUDA_HOME = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        libraries = next((home / name for name in ("lib64", "lib") if (home / name).exists()), home / "lib64")
        nvcc = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fvisibility=hidden", *DEFINES]
        nvcc += [f"-Xcompiler={PATH_MAP}"]
        if REPRODUCIBLE:
            # Names of what is internal to a file are drawn at random; the same ones each time, from nvcc 12.3.
            nvcc += ["-frandom-seed=ckpt_kernels"]
        found.append(
            extension(
                "_C_cuda",
                "cuda",
                "cu",
                flags | {"nvcc": nvcc},
                include_dirs=[str(home / "include")],
                library_dirs=[str(libraries)],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                # The symbols of libtorch_cuda.so, which a CPU-only torch does not have, are found through libtorch.so,
                # which the linker takes for one that is not needed.
                link=["-Wl,--no-as-needed", "-ltorch"],
            )
        )
    return found


def build_command(build: str) -> type:
    class BuildLibraries(cpp_extension().BuildExtension):
        def build_extensions(self) -> None:
            self.failed = []
            try:
                super().build_extensions()
            except Exception as error:  # of the compiler itself, before anything is compiled
                self._give_up(list(self.extensions), error)
            self.extensions = [extension for extension in self.extensions if extension not in self.failed]

        def build_extension(self, extension) -> None:
            self._forget_outdated_cuda_objects(extension)
            try:
                super().build_extension(extension)
            except Exception as error:
                self._give_up([extension], error)

        def _forget_outdated_cuda_objects(self, extension) -> None:
            """ninja sees the headers of C++ sources, but under a CPU-only torch not those of CUDA sources."""
            headers = [path for path in map(pathlib.Path, extension.depends) if path.suffix in (".h", ".cuh")]
            changed = max(path.stat().st_mtime for path in headers)
            for source in extension.sources:
                built = pathlib.Path(self.build_temp, source).with_suffix(".o")
                if source.endswith(".cu") and built.exists() and built.stat().st_mtime < changed:
                    built.unlink()

        def _give_up(self, extensions: list, error: Exception) -> None:
            if build != "auto":
                raise error
            self.failed += extensions
            names = " and ".join(extension.name for extension in extensions)
            warnings.warn(f"{names} could not be built, going on without: {error}", stacklevel=1)

    return BuildLibraries


build = wanted()
modules = extensions(build)
setup(
    version=version(),
    ext_modules=modules,
    cmdclass={"build_py": BuildPython} | ({"build_ext": build_command(build)} if modules else {}),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
