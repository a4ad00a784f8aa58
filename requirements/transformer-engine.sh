#!/bin/sh
# Compiles TransformerEngine for the Python on PATH, which has slurmlime's train and gpu extras. Arguments go to pip.
#
# It needs nvcc of CUDA 13.0 on PATH and a C++ compiler. Headers of cuDNN, NCCL and CUDA's libraries are taken from the
# wheels that torch has brought along. MAX_JOBS compilers run at once, each in 4 GB; the 33 files take half an hour of one.
set -eu
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
    echo "nvcc is not on PATH: load the site's module of CUDA 13.0, or apt-get install cuda-nvcc-13-0" >&2
    exit 1
fi
wheels=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
export CUDNN_PATH="$wheels/cudnn"
export CPATH="$wheels/cudnn/include:$wheels/nccl/include:$wheels/cu13/include${CPATH:+:$CPATH}"
exec python -m pip install --no-build-isolation -c requirements/gpu.txt "$@" '.[te]'
