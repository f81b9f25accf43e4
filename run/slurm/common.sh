# shellcheck shell=bash
# Shared by the batch files (sourced by them inside a job, not run): checks, logs, starting the ranks, queueing again.
#
#   LOGS=FOLDER   one file a rank, rank0.log, rank1.log, ...; default: slurm-JOB, beside slurm-JOB.out
#
# What a cluster needs (modules, network) goes into run/slurm/site.sh, which is sourced here if it exists, such as:
#   module load cuda/12.8                  # only for its driver libraries: torch brings its own CUDA
#   export NCCL_SOCKET_IFNAME=ib0          # the network card between nodes, if NCCL takes the wrong one (ip -br address)
#   export GLOO_SOCKET_IFNAME=eth0         # the same for runs on CPUs
#   export NCCL_DEBUG=INFO                 # NCCL tells in the ranks' logs what it takes: NET/IB is InfiniBand, NET/Socket is not
#   export MASTER_ADDR=$(hostname -I | cut -d' ' -f1)   # where the name of the first node leads to the wrong network
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venv/bin/python
if [ -r "$root/run/slurm/site.sh" ]; then
    set +u # modules are not made for it
    # shellcheck source=/dev/null
    source "$root/run/slurm/site.sh"
    set -u
fi
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
logs=${LOGS:-slurm-$job}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
log_name=rank%t
# A batch script that is submitted from within a step inherits that one's variables.
for name in "${!SLURM_STEP@}"; do
    unset "$name"
done
# srun does not take these over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# check RECIPE ...: whether every node can do it; paths in key=value are relative to where the job was submitted.
check() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} processes=${SLOTS:-${SLURM_TASKS_PER_NODE%%[(,]*}}
    [ $# -gt 0 ] || fail "which recipe? sbatch OPTIONS run/slurm/... RECIPE key=value ..."
    if [ "$gpus" -gt 0 ] && [ "$gpus" -ne "$processes" ]; then
        fail "$gpus GPUs and $processes processes on a node: there is one process a GPU, --gpus-per-node=N --ntasks-per-node=N"
    fi
    # shellcheck disable=SC2016  # expanded on the nodes
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        [ -x "$0" ] || { echo "error: $(hostname) has no $0: bash run/setup.sh, on a file system that all nodes share" >&2; exit 2; }
        [ -d "$1" ] || { echo "error: $(hostname) does not see $1: submit from a folder that all nodes share" >&2; exit 2; }
    ' "$python" "$logs" || exit 2
    printf '%s job %s on %s (restart %s): %s\n' "$(date '+%F %T')" "$job" "$SLURM_JOB_NODELIST" "${SLURM_RESTART_COUNT:-0}" "$*"
}

# ranks [--OPTION=VALUE ...] COMMAND ...: srun it with these options, one log a rank; do what its end asks for, and end the
# job with its exit code.
ranks() {
    local code=0 options=() stopped=$logs/stopped
    while [ "${1#--}" != "$1" ]; do
        options+=("$1")
        shift
    done
    rm -f "$stopped"
    srun --kill-on-bad-exit=1 --output="$logs/$log_name.log" --open-mode=append \
        "${options[@]}" "$python" "$root/run/slurm/rank.py" "$stopped" "$@" || code=$?
    # Stopped by a signal, with a checkpoint. At the time limit rank 0 has asked for the next turn, and this line is not
    # reached; it is where rank 0 could not, and where the job is preempted and has a while to end by itself. Nor does a
    # cancelled job come here: its batch script is ended, too.
    if [ -e "$stopped" ]; then
        printf '%s stopped with a checkpoint\n' "$(date '+%F %T')"
        rm -f "$stopped"
        code=75
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 60 # it ends this script
        fi
    elif [ "$code" -ne 0 ]; then # another turn would only repeat it
        printf '%s failed with code %d; the ends of %s:\n' "$(date '+%F %T')" "$code" "$logs/*.log" >&2
        tail -n 5 "$logs/${log_name%%%*}"[0-7].log >&2 || true
    else
        printf '%s finished\n' "$(date '+%F %T')"
    fi
    exit "$code"
}
