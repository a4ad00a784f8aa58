#!/bin/sh
# Resolves gpu.txt for every Python that the GPU install is for, with uv (first argument). What gpu.txt has stays as it is
# where it still fits; `make lock UPGRADE=--upgrade` takes the newest of everything.
set -eu
cd "$(dirname "$0")/.."
uv=$1
shift
lock=requirements/gpu.txt
new=$(mktemp)
trap 'rm -f "$new"' EXIT
if [ -f "$lock" ]; then grep -v '^#' "$lock" >"$new"; fi
"$uv" pip compile pyproject.toml requirements/current.txt --all-extras --universal --python-version 3.11 \
    --no-annotate --no-header --quiet --output-file "$new" "$@"
# The platform is the same in every line, and said once, here.
{
    echo '# Versions that fit together on a GPU node: Linux on x86_64, CUDA 13.0, Python 3.11 to 3.13. A constraints file:'
    echo "#   pip install -c requirements/gpu.txt '.[train,gpu]'"
    echo '# Made by resolving (make lock), never by hand.'
    sed -E -e "s/(platform_machine == 'x86_64'|sys_platform == 'linux'|python_full_version < '3.14')( and )?//g" \
        -e "s/[a-z_]*implementation[a-z_]* != 'PyPy'( and )?//" -e 's/( and | ; )+$//' "$new"
} >"$lock.tmp"
mv "$lock.tmp" "$lock"
