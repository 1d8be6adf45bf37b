#!/usr/bin/env bash
# Submits a recipe to Slurm: on as many nodes as asked, requeued when its time is up, until it is done.
#
#   bash scripts/slurm.sh RECIPE --output_dir DIR [--nodes N] [--gpus G] [--seeds LIST] [--warn SECONDS]
#                         [--sbatch OPTION]... [other flags of main.py]
#
#   --nodes N       nodes (1)
#   --gpus G        devices, and processes, of each node (8); 0 for one process on the CPU
#   --seeds LIST    one run for each seed, as an array job: 0-2 or 1,5,7; they write to DIR/seed-<seed>
#   --warn SECONDS  how long before the time limit the run is told to save and stop (300)
#   --sbatch OPTION an option for sbatch, as often as needed: --sbatch --partition=gpu --sbatch --time=24:00:00
#
# The plan is printed first, so that a mistake in recipe or flags costs no time in the queue.
set -euo pipefail

# ---- on the login node -------------------------------------------------------------------------------------------
submit() {
    local recipe nodes=1 gpus=8 seeds="" warn=300 output="" log signal=TERM options=() flags=()
    [[ $# -ge 1 && $1 != --* ]] || usage "the recipe comes first"
    recipe=$1 && shift
    if [[ ! -f $recipe ]]; then # as seen from here, or from the repository's root
        [[ -f $(dirname "${BASH_SOURCE[0]}")/../$recipe ]] || usage "there is no recipe $recipe"
        recipe=$(dirname "${BASH_SOURCE[0]}")/../$recipe
    fi
    recipe=$(cd "$(dirname "$recipe")" && pwd)/$(basename "$recipe")
    while (($#)); do
        [[ $1 == --*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
        (($# >= 2)) || usage "$1 needs a value"
        case $1 in
            --nodes) nodes=$2 ;;
            --gpus) gpus=$2 ;;
            --seeds) seeds=$2 ;;
            --warn) warn=$2 ;;
            --sbatch) options+=("$2") ;;
            --output_dir) output=$2 ;;
            *) flags+=("$1" "$2") ;;
        esac
        shift 2
    done
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || usage "--nodes $nodes is no number of nodes"
    [[ $gpus =~ ^[0-9]+$ ]] || usage "--gpus $gpus is no number of devices"
    [[ $warn =~ ^[0-9]+$ ]] || usage "--warn $warn is no number of seconds"
    [[ -n $output ]] || usage "--output_dir is not set"
    case $output in "~" | "~/"*) output=$HOME${output#\~} ;; esac # which --output_dir=~/x leaves to us
    mkdir -p "$output" && output=$(cd "$output" && pwd)

    . "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
    flags=(--recipe "$recipe" "${flags[@]}")
    "$PYTHON" "$ROOT/main.py" "${flags[@]}" --output_dir "$output" --plan table \
        --devices $((nodes * (gpus ? gpus : 1))) || exit

    # An older torchrun passes SIGTERM on to the workers, but dies of SIGUSR1.
    if torchrun_takes "$PYTHON" --signals_to_handle; then signal=USR1; fi

    log=$output/slurm-%j.log
    if [[ -n $seeds ]]; then
        options=("--array=$seeds" "${options[@]}")
        log=$output/slurm-%A_%a.log
    fi
    # For each device a core for each of eight loader workers, and one for the process that trains.
    ((gpus == 0)) || options=("--gpus-per-node=$gpus" "--cpus-per-task=$((9 * gpus))" "${options[@]}")
    # Later options win, so --sbatch can replace any of these.
    sbatch --job-name="$(basename "$recipe" .yaml)" --nodes="$nodes" --ntasks-per-node=1 --requeue \
        --signal="$signal@$warn" --open-mode=append --output="$log" "${options[@]}" \
        "$ROOT/scripts/slurm.sh" job "$ROOT" "$PYTHON" "$gpus" "$warn" "$output" "${flags[@]}"
}

torchrun_takes() { # PYTHON OPTION: whether this environment's torchrun knows the option
    [[ $("$1" -m torch.distributed.run --help) == *"$2"* ]]
}

usage() {
    echo "error: $1" >&2
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# ---- inside the job: Slurm runs its own copy of this file, again after each requeue ------------------------------
job() {
    local root=$1 python=$2 gpus=$3 warn=$4 output=$5 id=$SLURM_JOB_ID head port code=0 torchrun srun_options=()
    shift 5
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        output=$output/seed-$SLURM_ARRAY_TASK_ID
        set -- "$@" --seed "$SLURM_ARRAY_TASK_ID"
        id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    cd "$root"
    rm -f "$output/stopped.json" # of the time before this one
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((20000 + SLURM_JOB_ID % 20000)) # of this job alone, also where nodes are shared
    torchrun=(
        "$python" scripts/launch.py --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node $((gpus ? gpus : 1))
        --rdzv_backend c10d --rdzv_endpoint "$head:$port" --rdzv_id "$SLURM_JOB_ID"
    )
    if torchrun_takes "$python" --signals_to_handle; then
        torchrun+=(--signals_to_handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGXCPU")
    fi
    # After passing the signal on, torchrun waits half a minute for the workers to save; newer ones can wait longer.
    if torchrun_takes "$python" --shutdown_timeout; then
        torchrun+=(--shutdown_timeout "$warn")
    fi
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun_options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    srun --kill-on-bad-exit=1 "${srun_options[@]}" "${torchrun[@]}" main.py "$@" --output_dir "$output" || code=$?
    if [[ -f $output/stopped.json ]]; then
        rm -f "$output/stopped.json"
        echo "stopped after saving; requeueing job $id"
        scontrol requeue "$id"
        exit 0
    fi
    exit "$code"
}

if [[ ${1:-} == job && -n ${SLURM_JOB_ID:-} ]]; then
    shift
    job "$@"
else
    submit "$@"
fi
