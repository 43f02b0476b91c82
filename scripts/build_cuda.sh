#!/usr/bin/env bash
# Builds Tidemill with its towers on an NVIDIA GPU (--features cuda), or runs any other command of cargo so. Linux on x86-64.
#
#   scripts/build_cuda.sh                                      cargo build --release --bin tidemill
#   scripts/build_cuda.sh test --lib on_a_gpu -- --nocapture   what comes after it is cargo's
#
# Installs CUDA's compiler and libraries from PyPI into target/cuda/env, unless CUDA_HOME names a toolkit; builds to target/cuda, or
# CARGO_TARGET_DIR. No GPU and no driver are needed to build. CUDA_COMPUTE_CAP says for which GPU: 90 (Hopper) where none is seen.
#
# The program finds CUDA's libraries where they were at build time, and the driver (libcuda.so.1) where the system has it. Where there is
# none it does not start; what stands in target/cuda/stub lets it, to compute on the CPU:
#
#   LD_LIBRARY_PATH=target/cuda/stub target/cuda/release/tidemill train -c train.toml
#
# The first build takes some 20 minutes on two cores: Candle compiles all of its kernels.
set -euo pipefail
cd "$(dirname "$0")/.."

# What Candle's kernels of 0.11 compile with.
TOOLKIT='cuda-toolkit[nvcc,crt,nvvm,cccl,cudart,cublas,curand,nvrtc]==13.0.2'

case "${1-}" in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;; esac
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "only Linux on x86-64, this is $(uname -sm)" >&2; exit 1; }
if [ $# = 0 ]; then set -- build --release --bin tidemill; fi

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/cuda}
mkdir -p "$CARGO_TARGET_DIR"
command -v c++ >/dev/null || { echo "no C++ compiler, which nvcc needs: install build-essential" >&2; exit 1; }

if [ -z "${CUDA_HOME-}" ]; then
  env=$PWD/target/cuda/env
  if [ "$(cat "$env/installed.txt" 2>/dev/null)" != "$TOOLKIT" ]; then
    python3 -m venv "$env"
    "$env/bin/python" -m pip install -q --disable-pip-version-check "$TOOLKIT"
    echo "$TOOLKIT" >"$env/installed.txt"
  fi
  CUDA_HOME=$(echo "$env"/lib/python3*/site-packages/nvidia/cu13)
  # Wheels leave out the names that a linker looks for.
  for lib in "$CUDA_HOME"/lib/lib*.so.*; do
    name=${lib##*/}
    if [[ $name != *alt* ]]; then ln -sf "$name" "$CUDA_HOME/lib/${name%%.so.*}.so"; fi
  done
fi
export CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
if ! command -v nvidia-smi >/dev/null; then export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}; fi

flags="-C link-arg=-Wl,-rpath,$CUDA_HOME/lib"
driver=$(ldconfig -p | sed -n 's/.*libcuda\.so\.1 .*x86-64.* => //p' | head -1)
stub=$PWD/target/cuda/stub
mkdir -p "$stub"
if [ -n "$driver" ]; then
  ln -sf "$driver" "$stub/libcuda.so" # to link with; it is found by its own name when the program runs
  rm -f "$stub/libcuda.so.1"
elif [ ! -f "$stub/libcuda.so.1" ]; then
  # Every function of the driver, as a refusal: CUDA_ERROR_STUB_LIBRARY.
  {
    names=$(printf '#define __CUDA_API_VERSION_INTERNAL\n#include <cuda.h>\n' | cc -E -P -I"$CUDA_HOME/include" - |
      grep -oE '\bcu[A-Z][A-Za-z0-9_]* *\(' | tr -d ' (' | sort -u | grep -vE '^cuGetError(Name|String)$')
    for name in $names; do echo "int $name(void) { return 34; }"; done
    echo 'int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_STUB_LIBRARY"; return 0; }'
    echo 'int cuGetErrorString(int e, const char **s) { *s = "there is no NVIDIA driver on this machine"; return 0; }'
  } | cc -shared -fPIC -w -x c - -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1"
  ln -sf libcuda.so.1 "$stub/libcuda.so"
fi
flags+=" -L native=$stub"
# What cargo runs here finds the refusal where there is no driver; build scripts are cargo's own and need none.
if [ -z "$driver" ]; then export LD_LIBRARY_PATH=$stub${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; fi
export RUSTFLAGS="${RUSTFLAGS-} $flags"

command=$1
shift
exec cargo "$command" --locked --features cuda "$@"
