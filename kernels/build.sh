#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the CUDA library into the package: vllm_mxfp4_sm120/_native.so. For one card only, which is quicker:
#   TORCH_CUDA_ARCH_LIST=9.0 kernels/build.sh
set -euo pipefail

usage() {
  cat <<'TEXT'
kernels/build.sh [--native | --stub | --cutlass | --flashinfer] [-o FILE] [-- CMAKE ARGUMENTS]
  --native      the kernels (default); TORCH_CUDA_ARCH_LIST or CMAKE_CUDA_ARCHITECTURES choose the cards
  --stub        the same ops without GPU code; they raise unless MXFP4_SM120_ALLOW_STUB_KERNEL=1
  --cutlass     compile-only: CUTLASS's SM120 block-scaled grouped GEMM, from the headers that FlashInfer carries
  --flashinfer  compile-only: FlashInfer's own MXFP4 grouped GEMM for SM120 (its headers want cuRAND's)
  -o FILE       where the library goes (default: vllm_mxfp4_sm120/_native.so)
Environment: PYTHON (its torch gives the headers), CUDA_HOME, CUDACXX (nvcc), FLASHINFER_DIR (FlashInfer's package
folder), MAX_JOBS, BUILD_DIR (where CMake works)
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=native
output=$here/../vllm_mxfp4_sm120/_native.so
while (($#)); do
  case $1 in
    --native | --stub | --cutlass | --flashinfer) kind=${1#--} ;;
    -o)
      [[ -n ${2:-} ]] || { echo "build.sh: -o needs a file name" >&2; exit 2; }
      output=$2
      shift
      ;;
    -h | --help) usage; exit ;;
    --) shift; break ;;
    *) echo "build.sh: '$1' is not an option; see build.sh --help" >&2; exit 2 ;;
  esac
  shift
done

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x $here/../.venv/bin/python ]] && PYTHON=$here/../.venv/bin/python
fi
if [[ $kind != stub && -z ${CUDACXX:-} ]]; then
  # The machine's, or among Python's packages that of the extra [build].
  CUDACXX=$("$PYTHON" -c "import runpy, sys; print(runpy.run_path(sys.argv[1])['nvcc']() or '')" "$here/setup.py")
  if [[ -n $CUDACXX ]]; then export CUDACXX; else unset CUDACXX; fi
fi
# A folder for each kind and choice of cards: switching between them rebuilds nothing.
cards=$(printf %s "${CMAKE_CUDA_ARCHITECTURES:-}|${TORCH_CUDA_ARCH_LIST:-}|$PYTHON|$*" | cksum | cut -d' ' -f1)
build=${BUILD_DIR:-$here/build}/$kind-$cards
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
cmake -S "$here" -B "$build" "${generator[@]}" -DMXFP4_SM120_KIND="$kind" \
  -DPython3_EXECUTABLE="$(command -v "$PYTHON")" "$@"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"

case $kind in
  native | stub)
    # Put in place whole: a server that has the old library loaded keeps it.
    trap 'rm -f "$output.part"' EXIT
    cp "$build/_native.so" "$output.part"
    mv "$output.part" "$output"
    echo "built: $output ($kind)"
    ;;
  *) echo "compiled, not run: $kind is compile-only, nothing was installed" ;;
esac
