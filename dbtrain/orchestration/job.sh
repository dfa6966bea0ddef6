#!/bin/sh
# How a submitted job starts:  sh job.sh INTERPRETER... -- ARGUMENTS
# The first interpreter that has what dbtrain needs carries out `dbtrain ARGUMENTS`. A cluster's `python` need not be the
# one the user means, and what is missing shall be said in one sentence.

check='
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit("it is Python %d.%d, and dbtrain needs 3.11 or newer" % sys.version_info[:2])
needed = "torch ray numpy pyarrow pydantic yaml typer rich safetensors zstandard PIL".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
sys.exit("it lacks " + ", ".join(missing) if missing else 0)
'

chosen=
reasons=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ -z "$chosen" ]; then
        if ! command -v "$1" >/dev/null 2>&1; then
            reasons="$reasons; $1: there is none"
        elif reason=$("$1" -c "$check" 2>&1); then
            chosen=$1
        else
            reasons="$reasons; $1: $reason"
        fi
    fi
    shift
done
shift

if [ -z "$chosen" ]; then
    echo "dbtrain: no interpreter on node $(uname -n) can run dbtrain${reasons} (submit with --python PATH of one that can)" >&2
    exit 2
fi
exec "$chosen" -m dbtrain "$@"
