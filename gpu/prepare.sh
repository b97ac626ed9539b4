#!/usr/bin/env bash
# Fills .gpu/ with what a GPU machine without a network lacks: about 25 MB, ignored by git.
#
#     bash gpu/prepare.sh        (needs PyPI, unzip, and a Python that has torch, packaging, setuptools)
#
#   .gpu/ptxas.gz     NVIDIA's assembler of CUDA 13.3, newer than the one in any wheel of Triton
#   .gpu/fla/         flash-linear-attention, to compare with: Python and Triton only
#   .gpu/mamba_ssm/   the Triton kernels of mamba-ssm, to compare with, without its CUDA extension
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT_MIB=64
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT

"$PYTHON" -m pip download --quiet --no-deps --dest "$downloads" \
    --only-binary :all: --platform manylinux2014_x86_64 --python-version 3.12 \
    nvidia-cuda-nvcc==13.3.73 flash-linear-attention==0.6.0 fla-core==0.6.0
# A source distribution: pip asks its setup.py for metadata, which must not look for a CUDA compiler.
MAMBA_SKIP_CUDA_BUILD=TRUE "$PYTHON" -m pip download --quiet --no-deps --dest "$downloads" \
    --no-binary mamba-ssm --no-build-isolation mamba-ssm==2.3.2.post1

rm -rf .gpu
mkdir .gpu
unzip -p "$downloads"/nvidia_cuda_nvcc-*.whl nvidia/cu13/bin/ptxas | gzip -9 > .gpu/ptxas.gz
for wheel in "$downloads"/fla_core-*.whl "$downloads"/flash_linear_attention-*.whl; do
    unzip -qo "$wheel" 'fla/*' -d .gpu
done
tar -xzf "$downloads"/mamba_ssm-*.tar.gz -C "$downloads"
for folder in ops/triton utils; do
    mkdir -p .gpu/mamba_ssm/$folder
    cp -r "$downloads"/mamba_ssm-*/mamba_ssm/$folder/. .gpu/mamba_ssm/$folder/
done
# Empty: the original ones import the extension that must be compiled with CUDA.
for folder in . ops ops/triton utils; do
    : > .gpu/mamba_ssm/$folder/__init__.py
done

size=$(du -sk .gpu | cut -f1)
du -sh .gpu/*
if [ "$size" -gt $((LIMIT_MIB * 1024)) ]; then
    echo "expected at most $LIMIT_MIB MiB in .gpu, got $((size / 1024)): remove what is not needed" >&2
    exit 1
fi
echo "ready: .gpu has $((size / 1024)) MiB; take it along with the checkout"
