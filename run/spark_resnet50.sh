#!/usr/bin/env bash
# SparK (arXiv:2301.03580), ResNet-50, 1600 epochs on ImageNet-1K (recipe spark_resnet50), or another spark_* recipe.
#
#   DATA=/data/imagenet/train bash run/spark_resnet50.sh [key=value ...]
#   RECIPE=spark_convnext_small DATA=... bash run/spark_resnet50.sh     # _resnet101, _convnext_large_384, ...: --list
#   HOSTFILE=hosts DATA=... bash run/spark_resnet50.sh                  # several machines, "name slots=8" a line
#
# Hardware: N machines with 8 GPUs each. The batch stays 4096 images whatever N is (512 a GPU on one machine; more
#   train.accumulation=... where that does not fit). Nobody has measured its time with this code yet.
# Expected: 80.6 % top-1 after fine-tuning (table of the released code's README; ConvNeXt-S 84.1, ConvNeXt-L at 384 px 86.0).
#   Not yet repeated with this code: it needs the hardware above.
set -euo pipefail
: "${DATA:?folder of the training images}" "${RECIPE:=spark_resnet50}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch pretrain "$RECIPE" data.path="$DATA" output_dir="output/$RECIPE" "$@"
