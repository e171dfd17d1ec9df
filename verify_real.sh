#!/usr/bin/env bash
# What nobody could run where this was written: a real checkpoint from the hub, on three photographs that scikit-image ships.
# Needs a network, 4 GB of memory and some minutes. Writes verify_real.json: please report it, also if all agrees.
#   bash verify_real.sh [MODEL]    (default: HuggingFaceTB/SmolVLM-256M-Instruct)
set -euo pipefail
cd "$(dirname "$0")"
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
pip install --quiet -r requirements-dev.txt scikit-image==0.26.0
data=$(python -c 'import os, skimage; print(os.path.join(os.path.dirname(skimage.__file__), "data"))')
python -m bench real "${1:-HuggingFaceTB/SmolVLM-256M-Instruct}" --out verify_real.json \
    --image "$data/astronaut.png" "$data/chelsea.png" "$data/coffee.png"
