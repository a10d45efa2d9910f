#!/usr/bin/env bash
# mudit train ... starts one process per GPU of this node (under srun its tasks are the processes), mudit NAME ... runs
# launch/NAME.py; anything else runs as it is.
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
if [ "$command" = train ] && [ "${SLURM_STEP_NUM_TASKS:-1}" = 1 ]; then # several tasks are the processes of one run
    gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    exec python -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$code/launch/train.py" "$@"
elif [ -f "$code/launch/$command.py" ]; then
    exec python "$code/launch/$command.py" "$@"
fi
exec "$command" "$@"
