#!/usr/bin/env bash
# Whether clang takes the C++ sources for other systems than this one: a table of targets and sources; fails where one
# fails, or warns. No code is made. Arguments: targets, instead of the usual ones. Needs on PATH: python with torch and
# ziglang, which is a clang with the headers of each system. Windows is that of MinGW: Microsoft's headers are not in it.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- x86_64-linux-gnu aarch64-linux-gnu aarch64-macos x86_64-windows-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
read -r torch python < <(python -c "import sysconfig, torch; print(torch.__path__[0], sysconfig.get_path('include'))")
# Python's headers take the pyconfig.h beside them, so that for Windows all of them lie beside another.
cp -r "$python" "$work/windows"
cp packaging/windows/pyconfig.h "$work/windows/"
flags=(-std=c++17 -DTORCH_TARGET_VERSION=0x020b000000000000 -DUSE_CUDA -isystem "$torch/include"
    -isystem "$torch/include/torch/csrc/api/include")
# ziglang's own command knows the headers, but waits for an object file; the clang below it knows neither the headers nor
# how old a macOS is meant, and takes one that lacks the usual deallocation.
check() {
    python -m ziglang c++ -target "$1" "${flags[@]}" -isystem "$2" -E -o "$work/all.ii" "$3" &&
        python -m ziglang clang -target "$1" -std=c++17 -Wall -Wno-unknown-pragmas -Werror \
            -fsized-deallocation -faligned-allocation -fsyntax-only "$work/all.ii"
}
status=0
for target in "$@"; do
    headers=$python
    [[ $target != *windows* ]] || headers=$work/windows
    for source in csrc/cpu/*.cpp csrc/thin/*.cpp; do
        said=ok
        check "$target" "$headers" "$source" >"$work/log" 2>&1 || said=FAILED status=1
        printf '%-20s %-34s %s\n' "$target" "$source" "$said"
        [[ $said == ok ]] || cat "$work/log"
    done
done
exit $status
