#!/usr/bin/env bash
# What every push must pass, in ten minutes on two cores; test-long.sh runs the long tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(os.cpu_count() or 1, 4))')}"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -x -q -m "not long" "$@"
