#!/usr/bin/env bash
# The tests that train or measure for long; scripts/test.sh runs the others. Arguments go to pytest.
# As many processes as cores, of one thread each: a file's tests stay together.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$("$PYTHON" -c 'import os; print(min(os.cpu_count() or 1, 8))')"
"$PYTHON" -m pytest -x -q -m long -n "$workers" --dist loadfile "$@"
