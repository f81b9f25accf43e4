#!/usr/bin/env bash
# Pre-train or fine-tune with torchrun in place of DeepSpeed's launcher.
#
#   bash run/torchrun.sh pretrain RECIPE key=value ...
#   NPROC=2 bash run/torchrun.sh finetune digits_vit data.path=digits/train data.val_path=digits/val  # two CPU processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=gpu01 bash run/torchrun.sh pretrain ...       # on gpu01, and with NODE_RANK=1 on gpu02
#
# MASTER_PORT: where several machines meet (default 29500). NPROC: processes on this machine (default: its GPUs, or 1).
# SIGUSR1 or SIGTERM to this process: the run writes a checkpoint and ends; torchrun's exit code is then 1, and the same
#   command continues.
# Hardware: every GPU of each machine; without GPUs, NPROC processes on the CPU.
# Result: as run/pretrain.sh and run/finetune.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ]; then
    printf 'usage: bash run/torchrun.sh pretrain|finetune RECIPE key=value ...\n' >&2
    exit 2
fi
if [ ! -x "$root/.venv/bin/python" ]; then
    printf 'no environment yet: bash %s/run/setup.sh\n' "$root" >&2
    exit 1
fi
gpus=$("$root/.venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" -eq 0 ]; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
fi
if [ "${NNODES:-1}" -eq 1 ]; then
    options=(--standalone) # at a free port
else
    : "${NODE_RANK:?0 on the first machine, 1 on the second, ...}" "${MASTER_ADDR:?name of the first machine}"
    options=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# It hands these signals on to the ranks, and gives them five minutes for their checkpoint.
options+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 300)
exec "$root/.venv/bin/python" -m torch.distributed.run --nproc-per-node "$processes" "${options[@]}" --module "$@"
