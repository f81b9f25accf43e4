#!/usr/bin/env bash
# A Slurm cluster of two nodes, both of them this machine, without systemd and as any user: for trying batch scripts.
#
#   bash tests/slurm/cluster.sh start FOLDER     # then: export SLURM_CONF=FOLDER/slurm.conf; sinfo; sbatch ...
#   bash tests/slurm/cluster.sh stop FOLDER      # ends its jobs and its daemons; what they wrote stays in FOLDER
#
# Needs: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge   (tried: Slurm 22.05 of Debian 12)
# FOLDER: short (a socket in it has a path of at most 107 letters) and on a local disk. Ready in a second or two; 30 MB.
# Its nodes are 127.0.0.1 and 127.0.0.2 with CPUS (default 4) each, whatever the machine has; nothing listens outside of
#   it. A requeued job starts again after REQUEUE_SECONDS (default 5; Slurm's own is 120).
set -euo pipefail

PATH=$PATH:/usr/sbin # where Debian puts daemons, and an ordinary user does not look
daemons=(slurmd.127.0.0.1 slurmd.127.0.0.2 slurmctld munged)

fail() {
    printf 'cluster: %s\n' "$*" >&2
    exit 1
}

free_ports() { # a port for the controller and two neighbours for the nodes, free when they were looked for
    python3 - <<'PYTHON'
import contextlib
import random
import socket

while True:
    first = random.randrange(20000, 32000)
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        for port in range(first, first + 3):
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        print(first)
        break
PYTHON
}

start() {
    local folder=$1 user port waited
    for tool in munged slurmctld slurmd sinfo python3; do
        command -v "$tool" >/dev/null || fail "no $tool here; on Debian and Ubuntu: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
    done
    mkdir -p "$folder/state"
    folder=$(cd "$folder" && pwd)
    [ ! -e "$folder/slurm.conf" ] || fail "$folder has held a cluster already: take another folder"
    [ ${#folder} -le 90 ] || fail "the path of $folder is too long for a socket: take a shorter one, such as /tmp/slurm"
    user=$(id -un)
    port=$(free_ports)
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=${REQUEUE_SECONDS:-5}
CredType=cred/munge
SlurmctldPort=$port
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/spool.%n
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmdLogFile=$folder/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=127.0.0.[1-2] NodeHostname=localhost Port=[$((port + 1))-$((port + 2))] CPUs=${CPUS:-4} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=${GRACE_SECONDS:-0}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
    export SLURM_CONF=$folder/slurm.conf
    # --force: munged wants a folder that nobody else can write to, up to the root; the key is for this cluster only.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>"$folder/munged.err" ||
        fail "munged did not start: $(cat "$folder/munged.err" "$folder/munged.log" 2>/dev/null)"
    slurmctld -c
    slurmd -N 127.0.0.1
    slurmd -N 127.0.0.2
    for ((waited = 0; waited < 150; waited++)); do
        if [ "$(sinfo -h -o %D -t idle 2>/dev/null)" = 2 ]; then
            return
        fi
        sleep 0.2
    done
    tail -n 20 "$folder"/*.log >&2
    stop "$folder"
    fail "the nodes did not become ready; what the daemons said is above"
}

alive() { # name of a daemon, folder -> its process id, if that process is indeed this cluster's
    local pid
    pid=$(cat "$2/$1.pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && [[ "$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)" == *"${1%%.*}"* ]] && printf '%s' "$pid"
}

running() { # process id; one that nobody has collected does not run
    grep -qs '^State:[[:blank:]]*[^Z]' "/proc/$1/status"
}

stop() {
    local folder pid waited
    folder=$(cd "$1" && pwd)
    export SLURM_CONF=$folder/slurm.conf
    [ -e "$SLURM_CONF" ] || fail "$folder holds no cluster"
    # Jobs outlive the daemons of their nodes: they go first.
    if alive slurmctld "$folder" >/dev/null; then
        scancel -Q --user="$(id -un)" || true
        for ((waited = 0; waited < 100; waited++)); do
            [ -n "$(squeue -h 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    for daemon in "${daemons[@]}"; do
        pid=$(alive "$daemon" "$folder") || continue
        kill "$pid" 2>/dev/null || true
        for ((waited = 0; waited < 50; waited++)); do
            running "$pid" || break
            sleep 0.1
        done
        if running "$pid"; then
            kill -9 "$pid" 2>/dev/null || true
        fi
    done
}

case ${1:-} in
start | stop) [ $# -eq 2 ] || fail "usage: bash tests/slurm/cluster.sh start|stop FOLDER" && "$1" "$2" ;;
*) fail "usage: bash tests/slurm/cluster.sh start|stop FOLDER" ;;
esac
