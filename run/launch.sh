# shellcheck shell=bash
# Shared by the launchers (sourced, not run): one process per GPU of this machine, or of the machines in $HOSTFILE.
# A run that SIGUSR1 or SIGTERM reaches writes a checkpoint and ends: kill -USR1 -- -GROUP, where ps -o pgid shows the group
# of the script. After SIGUSR1 the script ends with 75, and the same command continues.
#
#   NPROC=4      processes on this machine; default: its GPUs, or 1 without a GPU
#   HOSTFILE=F   several machines, lines "name slots=8"; needs ssh without a password, pdsh, and the checkout and the
#                data under the same paths everywhere
#   MASTER_PORT  where the processes meet; default: a free port on one machine, 29500 on several
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# launch MODULE RECIPE key=value ...: paths in key=value are relative to where the script was called.
launch() {
    local python=$root/.venv/bin/python module=$1 options=() gpus threads code=0
    shift
    if [ ! -x "$python" ]; then
        printf 'no environment yet: bash %s/run/setup.sh\n' "$root" >&2
        return 1
    fi
    if [ $# -eq 0 ]; then
        printf 'usage: bash run/%s.sh RECIPE key=value ...; the recipes are:\n' "$module" >&2
        (cd "$root" && "$python" -m "$module" --list) >&2
        return 2
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    if [ -n "${HOSTFILE:-}" ]; then
        options=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
    else
        gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
        # Two runs on one machine must not meet at the same port.
        options=(--master_port "${MASTER_PORT:-$("$python" -c 'import socket as s; print(s.create_server(("127.0.0.1", 0)).getsockname()[1])')}")
        if [ "$gpus" -eq 0 ]; then
            export DS_ACCELERATOR=cpu
            threads=$(($(getconf _NPROCESSORS_ONLN) / ${NPROC:-1}))
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
            options+=(--num_gpus "${NPROC:-1}") # on a CPU: the number of processes
        elif [ -n "${NPROC:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
            # With --num_gpus the launcher would forget which GPUs were asked for.
            CUDA_VISIBLE_DEVICES=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | cut -d, -f"1-$NPROC")
            export CUDA_VISIBLE_DEVICES
        elif [ -n "${NPROC:-}" ]; then
            options+=(--num_gpus "$NPROC")
        fi
    fi
    # For the ranks, who hear it; the launchers above them, and this script, would die of it.
    trap '' USR1
    # -q: its own log says the command three times. PATH: helpers it looks for, such as ninja, live beside python.
    PATH="$root/.venv/bin:$PATH" "$root/.venv/bin/deepspeed" -q --no_local_rank "${options[@]}" --module "$module" "$@" || code=$?
    if [ "$code" -eq 75 ]; then # stopped by a signal: so is a script that has more to do
        exit 75
    fi
    return "$code"
}
