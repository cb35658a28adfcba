#!/usr/bin/env bash
# Everything that only a GPU can tell, in ten minutes and without installing anything (torch, timm, tabulate; PEFT if it is there):
#
#     OUT=somewhere PYTHON=python3 bash benchmarks/gpu.sh
#
# kernels   operators that keep codes against the plain ones, float32 and bfloat16
# step      memory and time of seven methods on ViT-B, float32 and bfloat16; predicted peaks beside max_memory_allocated
# peak      predicted against measured alone, on more families
#
# Most of the seconds go into compiling the kernels that make codes: set TORCHINDUCTOR_CACHE_DIR to a folder that stays.
#
# Writes $OUT/gpu-*.json. A stage that runs out of its seconds leaves the models that it had done. Without a GPU it goes through the
# same stages with small models on the CPU, in seven minutes at most.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=0

# stage NAME SECONDS SCRIPT OPTIONS...: writes gpu-NAME.json
stage() {
    local name=$1 seconds=$2 script=$3
    shift 3
    echo "== $name: $script $*"
    rm -f "benchmarks/results/gpu-$name.json"
    timeout "$seconds" "$python" "benchmarks/$script.py" "$@" --device "$device" --name "gpu-$name" || {
        echo "== $name: ended with status $? (124: out of its $seconds seconds)"
        failed=1
    }
    if [ "$out" != benchmarks/results ]; then mv "benchmarks/results/gpu-$name.json" "$out" || failed=1; fi
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda
    # processes share the cores, each compiles for itself, and what one has compiled the next ones find in the cache
    export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
    methods=(--methods full bias bias+lrp+lsb bias+checkpoint peft-lora s2a s2a-max)
    stage kernels-float32 60 kernels --batch-size 32
    stage kernels-bfloat16 60 kernels --batch-size 32 --dtype bfloat16
    vit=(--models vit_base_patch16_224 --batch-size 32 --rounds 5 --jobs 7)
    stage step-float32 120 step "${vit[@]}" "${methods[@]}"
    stage step-bfloat16 120 step "${vit[@]}" "${methods[@]}" --dtype bfloat16
    # of 16 images: torch 2.11's layer norm has no gradient for a bias alone beyond 65,536 rows
    stage peak 220 step --rounds 0 --batch-size 16 --jobs 16 --methods s2a s2a-max full linear bias bias+checkpoint s2a-paper \
        --models swin_base_patch4_window7_224 convnext_base resnet50 efficientnet_b0 convnextv2_atto pvt_v2_b0
else
    device=cpu
    export OMP_NUM_THREADS=1
    methods=(--methods full bias bias+checkpoint s2a s2a-max)
    stage kernels-float32 60 kernels --batch-size 1 --runs 2
    stage kernels-bfloat16 40 kernels --batch-size 1 --runs 2 --dtype bfloat16
    stage step-float32 100 step --models vit_tiny_patch16_224 --batch-size 2 --rounds 2 "${methods[@]}" lora
    stage step-bfloat16 100 step --models vit_tiny_patch16_224 --batch-size 2 --rounds 2 "${methods[@]}" --dtype bfloat16
    stage peak 120 step --models convnext_atto --batch-size 2 --rounds 0 --methods full bias s2a s2a-max
fi
ls -l "$out"/gpu-*.json
exit $failed
