#!/usr/bin/env bash
# Train by a recipe on all devices of this machine, or as one of several machines, through torchrun.
#
#   scripts/train.sh RECIPE [--nproc N] [--nnodes N --node_rank R --master HOST:PORT] [main.py's flags]
#   scripts/train.sh RECIPE [--nproc N] --nnodes MIN:MAX --master HOST:PORT [main.py's flags]
#
#   RECIPE            a YAML file, as seen from here or from the repository's root
#   --nproc N         processes on this machine; by default one per CUDA device, or one
#   --nnodes N        number of machines; run this script on each of them, with the same master and flags
#   --node_rank R     which of them this one is, 0 to N - 1
#   --master HOST:PORT  an address of machine 0, and a port that is free there
#   --nnodes MIN:MAX  elastic: machines may leave and join while the run goes on; the one of --master has to stay
#
# Examples:
#   scripts/train.sh recipes/demo.yaml --data_path data/demo --output_dir output/demo
#   scripts/train.sh recipes/in1k/convnext_tiny_etpp200.yaml --nnodes 2 --node_rank 0 --master node0:29500 --data_path /imagenet
set -euo pipefail

usage() {
    printf 'error: %s\nscripts/train.sh --help shows the usage\n' "$*" >&2
    exit 2
}

help() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
}

recipe="" nproc="" nnodes=1 node_rank="" master="" flags=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        help
        exit
        ;;
    --nproc | --nnodes | --node_rank | --master)
        [ $# -ge 2 ] || usage "$1 needs a value"
        declare "${1#--}=$2"
        shift 2
        ;;
    --nproc=* | --nnodes=* | --node_rank=* | --master=*)
        setting="${1#--}"
        declare "${setting%%=*}=${setting#*=}"
        shift
        ;;
    --*=*)
        flags+=("$1")
        shift
        ;;
    --*)
        [ $# -ge 2 ] || usage "$1 needs a value (every flag of main.py takes one)"
        flags+=("$1" "$2")
        shift 2
        ;;
    *)
        [ -z "$recipe" ] || usage "one recipe at a time; got $recipe and $1"
        recipe="$1"
        shift
        ;;
    esac
done

number() {
    case "$2" in
    '' | *[!0-9]*) usage "$1 must be a whole number, got '$2'" ;;
    esac
    [ "$2" -ge "$3" ] || usage "$1 must be at least $3, got $2"
}

least="${nnodes%%:*}" most="${nnodes#*:}"
[ -n "$recipe" ] || usage "name a recipe, such as recipes/demo.yaml"
number --nnodes "$least" 1
number --nnodes "$most" "$least"
[ "$nnodes" = "$most" ] || number "the most of --nnodes" "$most" 2
[ -z "$nproc" ] || number --nproc "$nproc" 1
if [ "$nnodes" != 1 ]; then
    if [ "$nnodes" != "$most" ]; then
        [ -z "$node_rank" ] || usage "--node_rank has no use with --nnodes $nnodes: machines that come and go have no number"
    else
        [ -n "$node_rank" ] || usage "--nnodes $nnodes needs --node_rank (0 to $((nnodes - 1)))"
        number --node_rank "$node_rank" 0
        [ "$node_rank" -lt "$nnodes" ] || usage "--node_rank must be 0 to $((nnodes - 1)) with --nnodes $nnodes, got $node_rank"
    fi
    case "$master" in
    ?*:[0-9]*) number "the port of --master" "${master##*:}" 1 ;;
    *) usage "--nnodes $nnodes needs --master HOST:PORT of machine 0, got '$master'" ;;
    esac
elif [ -n "$node_rank$master" ]; then
    usage "--node_rank and --master belong to several machines: give --nnodes too"
fi

. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

if [ ! -f "$recipe" ]; then
    [ -f "$ROOT/$recipe" ] || fail "recipe $recipe does not exist, neither here nor in $ROOT"
    recipe="$ROOT/$recipe"
fi
if [ -z "$nproc" ]; then
    nproc="$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
if [ "$nnodes" != "$most" ]; then
    # Restarts for machines that leave; those for machines that join are not counted.
    where=(--nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$master" --rdzv_id "$master" --max_restarts 100)
elif [ "$nnodes" -gt 1 ]; then
    where=(--nnodes "$nnodes" --node_rank "$node_rank" --master_addr "${master%:*}" --master_port "${master##*:}")
else
    where=(--standalone) # picks a free port itself, so that several jobs fit on one machine
fi
# SIGUSR1, too, makes the run save and stop; a torchrun that does not know this setting ignores it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGXCPU
exec "$PYTHON" "$ROOT/scripts/launch.py" "${where[@]}" --nproc_per_node "$nproc" "$ROOT/main.py" --recipe "$recipe" ${flags[@]+"${flags[@]}"}
