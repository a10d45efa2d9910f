#!/usr/bin/env bash
# A command of launch/ runs as mudit runs it: train with one process per GPU of this node, or, under srun, as one of its
# tasks. Anything else runs as it is, mudit itself too.
set -eu
export TOKENIZERS_PARALLELISM=false
# What NVIDIA's images do first: an older driver gets the libraries of a newer one.
base=/opt/nvidia/nvidia_entrypoint.sh
if [ -x "$base" ] && [ -z "${MUDIT_ENTERED:-}" ]; then
    MUDIT_ENTERED=1 exec "$base" "$0" "$@" 3>&1 >&2 # what it says is no output of the command
fi
[ -z "${MUDIT_ENTERED:-}" ] || exec >&3 3>&-
unset MUDIT_ENTERED
code=$(cd "$(dirname "$0")/.." && pwd)
command=${1:?train, another command of launch/, or any program}
shift
if [ -f "$code/launch/${command//-/_}.py" ]; then
    exec python "$code/launch/mudit.py" "$command" "$@"
fi
exec "$command" "$@"
