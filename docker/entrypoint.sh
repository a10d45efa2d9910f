#!/usr/bin/env bash
# mudit train ... starts one process per GPU of this node, mudit NAME ... runs launch/NAME.py; anything else runs as it is.
set -eu
export TOKENIZERS_PARALLELISM=false
code=$(cd "$(dirname "$0")/.." && pwd)
command=${1:?train, another command of launch/, or any program}
shift
if [ "$command" = train ]; then
    gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    exec python -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$code/launch/train.py" "$@"
elif [ -f "$code/launch/$command.py" ]; then
    exec python "$code/launch/$command.py" "$@"
fi
exec "$command" "$@"
