#!/usr/bin/env bash
# One GPU, at most nine minutes a call: first contact, correctness of every kernel, the kernels'
# speeds, the training step of SiT-XL/2 and as much of the other networks as fits. Two more parts are
# called by name: sampling and loaders. Needs torch, triton and numpy; matplotlib for the plots,
# torchdiffeq for sampling, scikit-learn for the loaders' images; liger_kernel, flash_attn, apex and
# DALI are measured if they are there. Nothing has to be installed from this checkout.
#
#   benchmarks/gpu_suite.sh [--smoke] [FOLDER [PART...]]
#
# --smoke: the same path on the CPU at toy sizes, all six parts, in a minute or two. It tests this
# script and the harness; its times are no speeds.
# FOLDER: runs/gpu_suite, or runs/gpu_suite_smoke. PART: first-contact, correctness, kernels, step,
# sampling, loaders; the first four without any. One part alone has the whole time: "correctness" is
# complete then, and "kernels" and "step" reach their last cells. Rows and plots of several runs add
# up, in one page. An op with wrong results has no speed, all others have.
# PYTHON=python3.12 picks the interpreter (.venv's, or python3), GIT_SHA=... names the commit where
# there is no .git.
# FOLDER gets, at any moment, at most seven files, since a rented machine may return few: suite.log,
# correctness_blocks.jsonl, correctness_objective.jsonl, rows.jsonl, environment.json, plots.tgz,
# page.html, which shows all of it.
# Exit status: 0, or that of the first part that failed; the other parts run all the same. 2 without
# a GPU.
set -uo pipefail
device=cuda
folder=runs/gpu_suite
if [ "${1:-}" = --smoke ]; then
    device=cpu
    folder=runs/gpu_suite_smoke
    # Beside a GPU, too: kernels run in Triton's interpreter only where torch sees none.
    export CUDA_VISIBLE_DEVICES=
    # Toy tensors: more threads only wait for each other, the more so beside other work.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    shift
fi
case ${1:-} in -*)
    echo "gpu_suite has the option --smoke, before the folder, got $1" >&2
    exit 2
    ;;
esac
folder=${1:-$folder}
parts=" ${*:2} "
if [ "$parts" = "  " ]; then
    parts=' first-contact correctness kernels step '
    [ "$device" = cuda ] || parts+='sampling loaders '
fi
for part in $parts; do
    case $part in first-contact | correctness | kernels | step | sampling | loaders) ;; *)
        echo "gpu_suite has the parts first-contact, correctness, kernels, step, sampling and" \
            "loaders, got $part" >&2
        exit 2
        ;;
    esac
done
out=$(mkdir -p "$folder" && cd "$folder" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
export PYTHONUNBUFFERED=1
# torch.profiler's own messages, several lines for every count of launches.
export KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-6}
# The profiler and CUDA graphs share a process: detaching the profiler can crash the graphs. It
# stays attached, so launches are counted after all timing.
export TEARDOWN_CUPTI=${TEARDOWN_CUPTI:-0}
segments=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
total=530
# Logs of builds, and pictures until they are packed: not in FOLDER, where each would be a file more.
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/plots"
[ ! -f "$out/plots.tgz" ] || tar -xzf "$out/plots.tgz" -C "$scratch/plots"
SECONDS=0
status=0

# wanted NAME: whether it is to be run.
wanted() {
    case $parts in *" $1 "*) ;; *) return 1 ;; esac
}

# alone NAME LIMIT: the seconds it may take: all of them if nothing else is wanted.
alone() {
    if [ "$parts" = " $1 " ]; then echo "$total"; else echo "$2"; fi
}

# keep STATUS: the suite's exit status is that of the first part that failed.
keep() {
    [ "$status" -ne 0 ] || status=$1
}

# part NAME LIMIT ARGUMENTS...: at most LIMIT seconds and what is left; killed if it overruns.
# Returns its exit status.
part() {
    local name=$1 limit=$2
    shift 2
    local left=$((total - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 35 ]; then
        echo "== $name: left out, ${SECONDS} s of $total s are gone"
        return 1
    fi
    echo "== $name: at most $limit s"
    # Start-up, a last cell that overruns and the plots are outside the deadline that the part
    # keeps itself. The interrupt lets it say what it has; the rows are on disk in any case.
    timeout --signal=INT --kill-after=10 "$limit" \
        "$python" -m "$@" --deadline $((limit - 25)) --device "$device" --out "$out"
    local code=$?
    echo "== $name: exit status $code, ${SECONDS} s in all"
    return "$code"
}

# show: the page, and the pictures in it packed, after each part: a killed script never reaches a
# step at its end.
show() {
    timeout 60 "$python" -m benchmarks.page "$out" --plots "$scratch/plots" ||
        echo "== no page"
    if [ -n "$(ls "$scratch/plots")" ]; then
        tar -czf "$scratch/plots.tgz" -C "$scratch/plots" . && mv "$scratch/plots.tgz" "$out"
    fi
}

# suite NAME LIMIT ARGUMENTS...: a part with rows, and all that there is by then on the page.
suite() {
    local code=0
    part "$@" || code=$?
    show
    return "$code"
}

# Whether there is a GPU (2), and whether memory can be had in expandable segments (3, or a crash).
# Reads torch and builds matplotlib's list of fonts once, so that no part has to wait for the disk.
probe='
import sys, torch
try:
    import matplotlib.font_manager
except Exception:
    pass
if not torch.cuda.is_available():
    sys.exit(2)
try:
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1).sum().item()
except RuntimeError:
    sys.exit(3)
'

# Asks the probe; 2 without a GPU.
find_gpu() {
    PYTORCH_CUDA_ALLOC_CONF=$segments "$python" -c "$probe"
    case $? in
    0) ;;
    1 | 2 | 126 | 127)
        echo "gpu_suite needs a CUDA GPU and a Python with torch; asked $python" >&2
        return 2
        ;;
    *)
        echo "== PYTORCH_CUDA_ALLOC_CONF=$segments does not work here, without it then"
        segments=
        unset PYTORCH_CUDA_ALLOC_CONF
        ;;
    esac
}

main() {
    local checks=() measure=()
    if [ "$device" = cuda ]; then
        find_gpu || return 2
        # All settings are more than a hundred kernels to compile: only with all the time.
        [ "$parts" = ' correctness ' ] || checks=(--level smoke)
    else
        echo "== smoke run on the CPU: a test of the harness, no speeds"
        checks=(--level timed)
        measure=(--smoke)
    fi
    local building=
    if wanted step && [ "$device" = cuda ]; then
        # The optimizer's pass; where it cannot be built, AdamWEMA's rows say so.
        timeout 150 "$python" -m mixflow_fast.extension build >"$scratch/csrc.log" 2>&1 &
        building=$!
    fi
    if wanted first-contact; then
        suite 'first contact' 60 benchmarks.first_contact "${measure[@]}"
        keep $?
    fi
    if wanted correctness; then
        # Most of it is compilation of kernels, one after another: two processes side by side.
        local limit blocks
        limit=$(alone correctness 150)
        part 'correctness of the blocks' "$limit" benchmarks.checks --family blocks \
            "${checks[@]}" &
        blocks=$!
        part 'correctness of the objective' "$limit" benchmarks.checks --family objective \
            "${checks[@]}"
        keep $?
        wait "$blocks"
        keep $?
        show
    fi
    if wanted kernels; then
        suite 'kernels' "$(alone kernels 155)" \
            benchmarks.run --suite kernels --plots "$scratch/plots" "${measure[@]}"
        keep $?
    fi
    if wanted step; then
        # Its micro-batches of several sizes share the memory: without this they would fragment it.
        if [ -n "$building" ] && ! wait "$building"; then
            echo "== csrc was not built:"
            tail -n 40 "$scratch/csrc.log"
        fi
        [ -z "$segments" ] || export PYTORCH_CUDA_ALLOC_CONF=$segments
        # 165 s less the probe's and the pages', and what the others did not need.
        suite 'training step' "$total" \
            benchmarks.run --suite step --plots "$scratch/plots" "${measure[@]}"
        keep $?
    fi
    if wanted sampling; then
        suite 'sampling' "$total" benchmarks.sampling "${measure[@]}"
        keep $?
    fi
    if wanted loaders; then
        suite 'loaders' "$total" benchmarks.loaders "${measure[@]}"
        keep $?
    fi
    echo "== results in $out"
    return "$status"
}

main 2>&1 | tee -a "$out/suite.log"
exit "${PIPESTATUS[0]}"
