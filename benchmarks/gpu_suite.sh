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
export PYTHONUNBUFFERED=1
# torch.profiler's own messages, several lines for every count of launches.
export KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-6}
# The profiler and CUDA graphs share a process: detaching the profiler can crash the graphs. It
# stays attached, so launches are counted after all timing.
export TEARDOWN_CUPTI=${TEARDOWN_CUPTI:-0}
segments=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
total=530
SECONDS=0
status=0

# part NAME LIMIT ARGUMENTS...: at most LIMIT seconds and what is left; killed if it overruns.
part() {
    local name=$1 limit=$2
    shift 2
    local left=$((total - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 35 ]; then
        echo "== $name: left out, ${SECONDS} s of $total s are gone"
        [ "$status" -ne 0 ] || status=1
        return
    fi
    echo "== $name: at most $limit s"
    # Start-up, a last cell that overruns and the plots are outside the deadline that the part
    # keeps itself. The interrupt lets it say what it has; the rows are on disk in any case.
    timeout --signal=INT --kill-after=10 "$limit" \
        "$python" -m "$@" --deadline $((limit - 25)) --device cuda --out "$out"
    local code=$?
    echo "== $name: exit status $code, ${SECONDS} s in all"
    [ "$status" -ne 0 ] || status=$code
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

main() {
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
    part 'correctness' 140 benchmarks.checks
    part 'kernels' 205 benchmarks.run --suite kernels
    # Its micro-batches of several sizes share the memory: without this they would fragment it.
    [ -z "$segments" ] || export PYTORCH_CUDA_ALLOC_CONF=$segments
    # 185 s less the probe's, and what the others did not need.
    part 'training step' "$total" benchmarks.run --suite step
    echo "== results in $out"
    return "$status"
}

main 2>&1 | tee "$out/suite.log"
exit "${PIPESTATUS[0]}"
