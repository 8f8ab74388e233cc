#!/usr/bin/env bash
# Builds dlkit for aarch64 and runs the tests of its CPU kernels there, under qemu, for more than an hour of one core;
# with --quick two cases of each, for ten minutes: check_neon.sh [arguments of pytest]
# Needs Debian on x86-64 with g++-aarch64-linux-gnu, qemu-user and, for apt-get download, dpkg --add-architecture arm64.
# Python comes from Debian's arm64 packages, torch from PyPI: 2.10 is the last whose wheel for aarch64 needs no CUDA.
# The compiler is the host's: qemu leaves an x86-64 program that an emulated one starts to the host.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$PWD/build/aarch64 python=python3.11
root=$folder/root site=$folder/site host_python=${PYTHON:-python3}

for tool in qemu-aarch64 aarch64-linux-gnu-g++; do
  command -v $tool > /dev/null || { echo "$tool is missing; run: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
done

if [ ! -e "$root/ready" ]; then
  mkdir -p "$folder/packages"
  packages=(python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev libc6 libstdc++6
    libgcc-s1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libncursesw6 libtinfo6
    libreadline8 libdb5.3 libcrypt1 libnsl2 libtirpc3 libgomp1)
  (cd "$folder/packages" && apt-get download "${packages[@]/%/:arm64}" > /dev/null 2>&1) ||
    { echo "no arm64 packages; run: dpkg --add-architecture arm64 && apt-get update"; exit 1; }
  for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$root"; done
  touch "$root/ready"
fi
if [ ! -e "$site/ready" ]; then
  "$host_python" -m pip install --quiet --target "$site" --only-binary=:all: --no-deps --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    torch==2.10.0 filelock typing_extensions sympy networkx jinja2 fsspec mpmath markupsafe 'setuptools>=70.1,<81' \
    numpy pytest iniconfig packaging pluggy pygments expecttest
  touch "$site/ready"
fi

emulated=(env PYTHONPATH="$folder/lib:$site" OMP_NUM_THREADS=2 qemu-aarch64 -L "$root" "$root/usr/bin/$python" -W ignore)
CXX=aarch64-linux-gnu-g++ DLKIT_BUILD=cpu CXXFLAGS="-isystem$root/usr/include" \
  "${emulated[@]}" setup.py -q build --build-base "$folder/build" --build-lib "$folder/lib"
cd "$folder"
"${emulated[@]}" -c 'import dlkit, platform; print(platform.machine(), dlkit._C.__file__)'
"${emulated[@]}" -m pytest -q -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider \
  ../../tests --ignore ../../tests/integration -m kernel -k cpu-default "$@"
