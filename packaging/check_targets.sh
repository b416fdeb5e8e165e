#!/usr/bin/env bash
# Checks that clang accepts the C++ sources for other systems, and prints a table of targets and sources. Fails on any
# error or warning. Generates no code. Arguments: targets, instead of the default ones. Needs on PATH: python with torch
# and ziglang, a clang with the headers of each system. For Windows these are MinGW's headers, not Microsoft's.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- x86_64-linux-gnu aarch64-linux-gnu aarch64-macos x86_64-windows-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
read -r torch python < <(python -c "import sysconfig, torch; print(torch.__path__[0], sysconfig.get_path('include'))")
# Python's headers include the pyconfig.h in their folder, so for Windows they are copied beside another pyconfig.h.
cp -r "$python" "$work/windows"
cp packaging/windows/pyconfig.h "$work/windows/"
flags=(-std=c++17 -DTORCH_TARGET_VERSION=0x020b000000000000 -DUSE_CUDA -isystem "$torch/include"
    -isystem "$torch/include/torch/csrc/api/include")
# `ziglang c++` knows the headers but must write an object file, so it only preprocesses. `ziglang clang` checks the
# syntax. By default its macOS is so old that it lacks sized deallocation.
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
