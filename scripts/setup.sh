# Sourced by the scripts beside it: leaves $PYTHON, an interpreter of ./.venv that has the package and its pinned
# dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -e .venv ]; then
    base=""
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base="$candidate"
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "stepdistill needs Python 3.10 or newer; found: $(python3 --version 2>&1 || true)" >&2
        exit 2
    fi
    if ! "$base" -m venv .venv; then
        rm -rf .venv
        echo "could not make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
        exit 1
    fi
fi
PYTHON=.venv/bin/python
[ -e "$PYTHON" ] || PYTHON=.venv/Scripts/python.exe        # Windows

# Nothing to install when this very pyproject and these very pins were installed before.
stamp=".venv/stepdistill-$("$PYTHON" -c 'import hashlib, pathlib
read = b"".join(pathlib.Path(p).read_bytes() for p in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(read).hexdigest()[:16])')"
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (once, some minutes)"
    pip="$PYTHON -m pip --disable-pip-version-check --quiet"
    rm -f .venv/stepdistill-*
    # first and alone: an index of CPU or CUDA builds decides which
    $pip install "$(tr -d '\r' < constraints.txt | grep '^torch==')"
    $pip install -c constraints.txt -e ".[dev,data]"
    # torch's builds for CUDA bring it; elsewhere its interpreter runs the test of our kernel, where it has a wheel
    $pip install triton || echo "Triton cannot be installed here: the test of its kernel is skipped" >&2
    touch "$stamp"
fi
