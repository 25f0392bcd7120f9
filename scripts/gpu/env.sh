# Sourced by the scripts beside it: the checkout first on the path, and $PYTHON, an interpreter that has the
# dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -e .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
