#!/usr/bin/env bash
# The table of docs/results/cifar10.md: every method pre-trained on CIFAR-10 and judged against its untrained network.
#
#   DATA=/data/cifar10 OUT=output/cifar10 bash run/cifar10.sh     # DATA holds train/<class>/* and test/<class>/*
#
# A few hours on two CPU cores with 20,000 training images. Stopped, it goes on when it is given again.
# Settings in WORDS reach every command: WORDS="threads=1 data.workers=1".
set -euo pipefail
: "${DATA:?folder with train/ and test/}" "${OUT:=output/cifar10}" "${WORDS:=}" "${PYTHON:=.venv/bin/python}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra words <<<"$WORDS"

pretrain() { # recipe run [key=value ...]
    "$PYTHON" -m pretrain "$1" data.path="$DATA/train" output_dir="$OUT/$2" "${words[@]}" "${@:3}"
}
judge() { # fine-tuning recipe, image size, starting points as name:run
    local recipe=$1 size=$2 inits=scratch
    for init in "${@:3}"; do
        local name=${init%%:*} run=$OUT/${init#*:}
        inits+=",$name:$run"
        for task in knn probe; do
            "$PYTHON" -m finetune "$task" data.path="$DATA" data.image_size="$size" data.eval_crop_ratio=1.0 \
                encoder.pretrained="$run" output_dir="$OUT/${task}_$name" "${words[@]}"
        done
    done
    "$PYTHON" -m finetune compare "$recipe" init="$inits" labels=0.01,0.1 seeds=3 scratch.optim.layer_decay=1 \
        data.path="$DATA" output_dir="$OUT/compare_$recipe" "${words[@]}"
}

pretrain cifar_dvae dvae
pretrain cifar_cim cim_respix cim.tokenizer="$OUT/dvae/tokenizer.safetensors"
pretrain cifar_cim cim_revdet cim.tokenizer="$OUT/dvae/tokenizer.safetensors" cim.objective=revdet
pretrain cifar_spark_resnet spark
pretrain cifar_fcmae fcmae
pretrain cifar_convmae convmae
judge cifar_vit 32 RESPIX:cim_respix REVDET:cim_revdet
judge cifar_resnet 64 SparK:spark
judge cifar_convnext 64 FCMAE:fcmae
judge cifar_convvit 64 ConvMAE:convmae
