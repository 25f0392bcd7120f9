#!/usr/bin/env bash
# What every push must pass, in a quarter of an hour on two cores; test-long.sh runs the long tests. Arguments go to
# pytest. As many processes as cores, of one thread each: a file's tests stay together, and share what its fixtures
# make.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$("$PYTHON" -c 'import os; print(min(os.cpu_count() or 1, 8))')"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -x -q -m "not long" -n "$workers" --dist loadfile "$@"
