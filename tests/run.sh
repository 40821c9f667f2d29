#!/bin/sh
# The tests, without the long ones: sh tests/run.sh
# Arguments go to pytest: sh tests/run.sh -k padding. In two processes; -n 0: in one, for -s.
set -e
arguments="$*"
set -- tests/requirements.txt
. "$(dirname "$0")/setup.sh"
# shellcheck disable=SC2086
exec "$python" -m pytest tests -n 2 $arguments
