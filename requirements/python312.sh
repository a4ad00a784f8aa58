#!/bin/sh
# Prints the path of a Python 3.12: $PYTHON312 where that is set, else python3.12, else one of pyenv's.
set -eu
pyenv=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")
for candidate in ${PYTHON312:-python3.12 "$pyenv"/versions/3.12.*/bin/python}; do
    # pyenv's shim may stand for no version: only one that starts counts
    path=$("$candidate" -c 'import sys; sys.version_info[:2] == (3, 12) and print(sys.executable)' 2>/dev/null) || continue
    [ -n "$path" ] && echo "$path" && exit
done
if [ -n "${PYTHON312-}" ]; then
    echo "PYTHON312=$PYTHON312 is not a Python 3.12." >&2
else
    echo "There is no Python 3.12 on this machine: neither python3.12 nor one of pyenv's." >&2
fi
echo "Get one with 'apt-get install python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12'," \
    "or name it: make test-current PYTHON312=/path/to/python3.12" >&2
exit 1
