#!/usr/bin/env bash
# The whole evidence from a machine with a CUDA GPU: correctness, then benchmarks, then the targets.
#
#     bench/gpu_check.sh [--dry-run] OUT [stage...]      without a stage: all, in this order
#
# No network, no installs: what the interpreter has is used. A stage ends after 8 minutes; one that
# fails is named at the end and stops no other. Logs and JSON go to OUT; the settings of the GPU are
# read and never changed. Exit status: 0, 1 where a stage failed, 2 where it cannot begin.
set -uo pipefail

stages=(setup correct rest sanitize determinism bench-quick bench-training bench-decode bench-multi
    bench-group bench-compiled bench-grid hopper hopper-cuda hopper-cuda-sanitize
    tune steps methods dram demo report)
numeric=(tests/test_shrink.py tests/test_segment_gemm.py tests/test_row_reduce.py tests/test_dropout.py
    tests/test_lora_linear.py tests/test_lora_add.py tests/test_lora_linear_group.py
    tests/test_multi_lora_linear.py tests/test_soft_threshold.py tests/test_dept_embedding.py tests/test_lora_embedding.py
    tests/test_cuda_kernels.py tests/test_bank.py tests/test_regressions.py tests/test_reference.py)

usage() {
    echo "usage: bench/gpu_check.sh [--dry-run] OUT [stage...]" >&2
    echo "stages: ${stages[*]}" >&2
    exit 2
}

dry=
if [[ ${1-} == --dry-run ]]; then
    dry=1
    shift
fi
[[ $# -ge 1 && ${1:0:1} != - ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
chosen=("$@")
[[ $# -gt 0 ]] || chosen=("${stages[@]}")
for stage in "${chosen[@]}"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || { echo "no stage $stage" >&2; usage; }
done
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON-}
if [[ -z $python ]]; then
    python=$PWD/.venv/bin/python
    [[ -n $dry || -x $python ]] || make --silent extension || exit 2
fi
if [[ -z $dry ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu_check.sh: torch sees no CUDA device" >&2
    exit 2
fi

limit=480
failed=()

# step STAGE COMMAND...: into the stage's log, and the end of it to the terminal.
step() {
    local stage=$1
    shift
    if [[ -n $dry ]]; then
        echo "$stage: timeout $limit $*"
        return
    fi
    echo "== $stage: $*" | tee -a "$out/$stage.log"
    timeout --kill-after=10 "$limit" "$@" >> "$out/$stage.log" 2>&1
    local status=$?
    tail -n 6 "$out/$stage.log"
    [[ $status -eq 0 ]] || failed+=("$stage (exit $status: $*)")
}

tests() { step "$1" env FUSED_LORA_TEST_DEVICE=cuda "$python" -m pytest -q -ra --tb=short "${@:2}"; }

# Only the JSON is kept: every table and picture is made from it.
bench() {
    local stage=$1
    shift
    step "$stage" "$python" -m "$@" --out "$out/tables"
    mv "$out"/tables/*.json "$out" 2> /dev/null
    rm -rf "$out/tables"
}

# The rest of a stage that takes several commands, a share of the time each.
shared() {
    local whole=$limit parts=$1
    shift
    limit=$((whole / parts))
    "$@"
    limit=$whole
}

facts() {
    nvidia-smi
    nvcc --version
    git log -1 --format='%H %s'
    "$python" -m fused_lora.cli doctor
    "$python" -m fused_lora.cli doctor --json
}

for stage in "${chosen[@]}"; do
    case $stage in
        setup)
            shared 2 step setup make extension "PYTHON=${PYTHON:-python3}"
            if [[ -n $dry ]]; then
                echo "setup: nvidia-smi, nvcc --version, the commit and fused-lora doctor into machine.txt"
            else
                facts > "$out/machine.txt" 2>&1
            fi
            ;;
        correct) tests correct "${numeric[@]}" ;;
        rest)
            skip=("${numeric[@]/#/--ignore=}" --ignore=tests/test_gpu.py --ignore=tests/test_compiled.py)
            tests rest tests "${skip[@]}" --ignore=tests/test_mutations.py --ignore=tests/test_packaging.py
            ;;
        sanitize)
            # Memory that torch caches would hide an access beyond a tensor's end.
            check=("$python" -m fused_lora.cli verify --shapes 200x136 --rows 77 --rank 12 --dtype bf16,fp32)
            for tool in memcheck racecheck initcheck synccheck; do
                shared 4 step sanitize env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
                    "${check[@]}" --backend triton,cuda
            done
            ;;
        determinism) tests determinism tests/test_gpu.py ;;
        bench-quick) bench bench-quick fused_lora.bench.run --stage quick --seconds 400 ;;
        bench-training) bench bench-training fused_lora.bench.run --op lora_linear --stage training --seconds 400 ;;
        bench-decode) bench bench-decode fused_lora.bench.run --op lora_linear --stage decode --seconds 400 ;;
        bench-multi)
            bench bench-multi fused_lora.bench.run --op multi_lora_linear --op multi_lora_add_ --stage decode --stage training \
                --stage ranks --seconds 130
            ;;
        bench-group)
            bench bench-group fused_lora.bench.run --op lora_linear_group --op lora_add --stage training --stage decode --seconds 100
            ;;
        bench-compiled) bench bench-compiled fused_lora.bench.run --op lora_linear --stage compiled --seconds 360 ;;
        bench-grid) bench bench-grid fused_lora.bench.run --op lora_linear --stage grid --seconds 400 ;;
        hopper)
            # The Gluon kernel: alone, then under the ops, which this table sends to it where it can run.
            export FUSED_LORA_TUNING=$PWD/bench/gluon.json
            shared 2 bench hopper fused_lora.bench.hopper
            shared 2 tests hopper tests/test_hopper.py tests/test_segment_gemm.py tests/test_lora_linear.py \
                tests/test_lora_linear_group.py
            unset FUSED_LORA_TUNING
            ;;
        hopper-cuda)
            # The CUDA form of segment_gemm for compute capability 9.0: alone, then under the ops.
            shared 2 bench hopper-cuda fused_lora.bench.hopper_cuda
            export FUSED_LORA_CUDA_GEMM=sm90
            shared 2 tests hopper-cuda tests/test_segment_gemm_sm90.py tests/test_segment_gemm.py \
                tests/test_lora_linear.py
            unset FUSED_LORA_CUDA_GEMM
            ;;
        hopper-cuda-sanitize)
            for tool in memcheck racecheck initcheck synccheck; do
                shared 4 step hopper-cuda-sanitize env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
                    "$python" -m fused_lora.bench.hopper_cuda --small --out "$out/small"
            done
            rm -rf "$out/small"
            ;;
        tune) step tune "$python" -m fused_lora.cli tune --out "$out/tuning.json" --rows 2048,8192 ;;
        steps) bench steps fused_lora.bench.step --seconds 240 ;;
        methods)
            shared 2 step methods "$python" -m fused_lora.bench.methods --out "$out"
            shared 2 step methods "$python" -m fused_lora.bench.dept --out "$out"
            ;;
        dram) bench dram fused_lora.bench.dram ;;
        demo) step demo "$python" examples/demo.py --out "$out" ;;
        report)
            if [[ -n $dry ]]; then
                echo "report: $python -m fused_lora.bench.report targets $out"
            else
                "$python" -m fused_lora.bench.report targets "$out" > "$out/targets.txt" 2>&1 ||
                    failed+=("report")
            fi
            ;;
    esac
done

[[ -n $dry ]] && exit 0
[[ -f $out/targets.txt && " ${chosen[*]} " == *" report "* ]] && cat "$out/targets.txt"
for stage in "${failed[@]}"; do
    echo "FAILED: $stage" >&2
done
[[ ${#failed[@]} -eq 0 ]]
