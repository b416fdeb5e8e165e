"""Builds the compiled libraries: `_C` and `_thin` with a C++ compiler, `_C_cuda` with nvcc.

- CKPT_KERNELS_BUILD=none|cpu|cuda selects the libraries ("cuda" means all), and a failure stops the build. If it is not
  set, a failure is a warning, and the package works without the library.
- CKPT_KERNELS_VERSION_SUFFIX=+name adds a local version to the version of the build.
- CXX names the compiler. By default it is GCC or clang, and on Windows clang-cl.

`_C` and `_C_cuda` use torch's stable ABI and not Python's C API. `_thin` uses Python's limited API and not torch. So
one build works with every Python >= 3.10 and every torch >= 2.11.
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
# The flags keep rounding and NaN as written. They give up errno, floating-point traps and the sign of zero.
MATH = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
# Packagers set this variable to request reproducible builds.
REPRODUCIBLE = "SOURCE_DATE_EPOCH" in os.environ
# The table of local symbols contains names of nvcc's temporary files. Windows libraries have no such table.
STRIP = {"darwin": ["-Wl,-x"], "win32": []}.get(sys.platform, ["-Wl,-s"])
# For tests: a CPU library that stops at the first invalid access or undefined operation. With -O3 the vector code would
# compile for too long.
SANITIZE = (
    ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
    if os.environ.get("CKPT_KERNELS_SANITIZE") == "1"
    else []
)


def wanted() -> str:
    """The value of CKPT_KERNELS_BUILD: none, cpu or cuda; auto if the variable is not set."""
    value = os.environ.get("CKPT_KERNELS_BUILD", "") or "auto"
    if value not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"CKPT_KERNELS_BUILD is {value!r}; expected none, cpu or cuda")
    return value


def version() -> str:
    """The version in `ckpt_kernels/version.py`, followed by CKPT_KERNELS_VERSION_SUFFIX (such as "+cu130")."""
    text = pathlib.Path("ckpt_kernels", "version.py").read_text()
    return re.search(r'__version__ = "(.*)"', text).group(1) + os.environ.get("CKPT_KERNELS_VERSION_SUFFIX", "")


class BuildPython(build_py):
    """Writes the version with its suffix into the built package, but not into the source or an editable install."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            built = pathlib.Path(self.build_lib, "ckpt_kernels", "version.py")
            built.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version()}"', built.read_text()))


def compiler() -> str | None:
    """The compiler that CXX names, or the default one: on Windows clang-cl, because MSVC has no vector types."""
    usual, otherwise = ("clang-cl", "clang-cl") if WINDOWS else ("c++", "g++")
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or usual) or shutil.which(otherwise)


def is_gcc() -> bool:
    """Whether the compiler is GCC, and not clang, which may be installed as c++ too."""
    printed = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in printed


def path_maps(torch_build) -> list[str]:
    """Flags that make libraries independent of the folders of the build and of torch.

    Error messages contain the path of their source file, also those in torch's headers. Of two maps that fit a path,
    the last applies: torch may lie in the folder of the build.
    """
    folders = {pathlib.Path(__file__).resolve().parent: ".", pathlib.Path(torch_build.__file__).parents[1]: "torch"}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def cxx_flags(torch_build) -> list[str]:
    """The compiler's flags for C++ sources."""
    flags = [
        *(SANITIZE or ["-O3", "-g0"]),
        "-fvisibility=hidden",
        *path_maps(torch_build),
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        *DEFINES,
        *MATH,
    ]
    if is_gcc():
        # GCC 12 warns about code in its own intrinsics headers.
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    # torch looks for the flag of the C++ standard in the spelling of the system's compiler, and would else add another.
    return ["/std:c++17", *(f"/clang:{flag}" for flag in flags)] if WINDOWS else ["-std=c++17", *flags]


def compiler_runtime() -> dict[str, list[str]]:
    """On Windows, the library with clang's functions for processor features, which Microsoft's linker does not find."""
    if not WINDOWS:
        return {}
    printed = subprocess.run([compiler(), "-print-resource-dir"], capture_output=True, text=True, check=True).stdout
    folder = pathlib.Path(printed.strip(), "lib", "windows")
    return {"library_dirs": [str(folder)], "libraries": ["clang_rt.builtins-x86_64"]}


def cpp_extension():
    """The build support of torch. Without a working torch, exits with the packages to install."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # for example OSError for a missing shared library
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
    """The CUDA toolkit that nvcc belongs to. The nvcc on PATH may be a wrapper outside the toolkit."""
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
        os.environ.setdefault("CXX", "clang-cl")  # read by torch's build support
    flags = {"cxx": cxx_flags(torch_build)}
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
        nvcc += [f"-Xcompiler={path_map}" for path_map in path_maps(torch_build)]
        if REPRODUCIBLE:
            # nvcc draws names for symbols that are internal to a file. From nvcc 12.3 on, a seed fixes these names.
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
                # A CPU-only torch has no libtorch_cuda.so, so its symbols are found through libtorch.so, which the
                # linker would drop as not needed.
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
            except Exception as error:  # torch's check of the compiler failed before any source was compiled
                self._give_up(list(self.extensions), error)
            self.extensions = [extension for extension in self.extensions if extension not in self.failed]

        def build_extension(self, extension) -> None:
            self._remove_outdated_cuda_objects(extension)
            try:
                super().build_extension(extension)
            except Exception as error:
                self._give_up([extension], error)

        def _remove_outdated_cuda_objects(self, extension) -> None:
            """Remove objects of CUDA sources that are older than a header.

            With a CPU-only torch, ninja tracks the headers of C++ sources but not those of CUDA sources.
            """
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
