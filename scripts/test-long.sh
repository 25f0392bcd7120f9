#!/usr/bin/env bash
# The tests that train or measure for long; scripts/test.sh runs the others. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(os.cpu_count() or 1, 4))')}"
"$PYTHON" -m pytest -x -q -m long "$@"
