#!/usr/bin/env bash
# Source distribution -> wheel with the native backend -> empty environment -> smoke test. Run it as `make wheel-check`;
# the argument is the Python of the environment that has torch, ninja and setuptools.
set -euo pipefail
python=$(realpath -s "$1")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip=("$python" -m pip --quiet --disable-pip-version-check)

cd "$root"
"$python" -c 'import sys, setuptools.build_meta as meta; meta.build_sdist(sys.argv[1])' "$work" > "$work/sdist.log" ||
    { cat "$work/sdist.log"; exit 1; }
cd "$work"
# what `make build` compiled from the same sources is not compiled again
BRN_BUILD_NATIVE=1 BRN_KERNELS_CACHE="$root/brn_kernels/_native" "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir . ./*.tar.gz
echo "built $(basename ./*.whl)"

"$python" -m venv --without-pip empty
"${pip[@]}" --python empty/bin/python install --no-deps --no-index ./*.whl
# torch comes from the other environment, as a plain path: its editable installs are not seen through that
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > torch.pth
mv torch.pth "$(empty/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
env -u PYTHONPATH BRN_KERNELS_CACHE="$work/no-cache" empty/bin/python "$root/scripts/smoke_test.py" --within "$work/empty"
