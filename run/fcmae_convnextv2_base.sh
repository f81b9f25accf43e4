#!/usr/bin/env bash
# FCMAE (ConvNeXt V2, arXiv:2301.00808), ConvNeXt V2-Base, 1600 epochs on ImageNet-1K (recipe fcmae_convnextv2_base).
#
#   DATA=/data/imagenet/train bash run/fcmae_convnextv2_base.sh [key=value ...]
#   HOSTFILE=hosts DATA=... bash run/fcmae_convnextv2_base.sh      # several machines, "name slots=8" a line
#
# Hardware: N machines with 8 GPUs each; the authors took 8 of them. The batch stays 4096 images whatever N is (512 a GPU
#   on one machine; more train.accumulation=... where that does not fit). Nobody has measured its time with this code yet.
# Expected: 84.9 % top-1 after 100 epochs of fine-tuning (table of the released code's README).
#   Not yet repeated with this code: it needs the hardware above.
set -euo pipefail
: "${DATA:?folder of the training images}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch pretrain fcmae_convnextv2_base data.path="$DATA" output_dir=output/fcmae_convnextv2_base "$@"
