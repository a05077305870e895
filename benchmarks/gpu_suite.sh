#!/usr/bin/env bash
# Everything on one GPU in under nine minutes: correctness of every kernel, the kernels' speeds, one
# training step of SiT-XL/2. Needs torch, triton and numpy; matplotlib for the plots. Nothing has to
# be installed from this checkout.
#
#   benchmarks/gpu_suite.sh [FOLDER]       (FOLDER: runs/gpu_suite)
#
# PYTHON=python3.12 picks the interpreter (.venv's, or python3), GIT_SHA=... names the commit where
# there is no .git.
# FOLDER gets correctness.jsonl, rows.jsonl, environment.json, suite.log and a PNG for each op.
# Exit status: 0, or that of the first part that failed; the other parts run all the same. 2 without
# a GPU.
set -uo pipefail
out=$(mkdir -p "${1:-runs/gpu_suite}" && cd "${1:-runs/gpu_suite}" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
# Micro-batches of several sizes share the memory: without this they would fragment it.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONUNBUFFERED=1
# torch.profiler's own messages, several lines for every count of launches.
export KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-6}
total=530
SECONDS=0
status=0

# part NAME LIMIT ARGUMENTS...: at most LIMIT seconds and what is left; killed if it overruns.
part() {
    local name=$1 limit=$2
    shift 2
    local left=$((total - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 20 ]; then
        echo "== $name: left out, ${SECONDS} s of $total s are gone"
        [ "$status" -ne 0 ] || status=1
        return
    fi
    echo "== $name: at most $limit s"
    # Start-up and plots are outside the deadline that the part keeps itself. The interrupt lets it
    # say what it has; the rows are on disk in any case.
    timeout --signal=INT --kill-after=10 "$limit" \
        "$python" -m "$@" --deadline $((limit - 15)) --device cuda --out "$out"
    local code=$?
    echo "== $name: exit status $code, ${SECONDS} s in all"
    [ "$status" -ne 0 ] || status=$code
}

main() {
    "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)' || {
        echo "gpu_suite needs a CUDA GPU and a Python with torch; asked $python" >&2
        return 2
    }
    part 'correctness' 150 benchmarks.checks
    part 'kernels' 175 benchmarks.run --suite kernels
    part 'training step' 240 benchmarks.run --suite step
    echo "== results in $out"
    return "$status"
}

main 2>&1 | tee "$out/suite.log"
exit "${PIPESTATUS[0]}"
