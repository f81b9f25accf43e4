#!/usr/bin/env bash
# FCMAE under other masks (ConvNeXt V2, figures 4 and 5): each setting is pre-trained, its reconstruction error measured on
# VAL with fixed masks, and its encoder judged by k-NN.
#
#   TRAIN=/data/imagenet/train VAL=/data/imagenet/val bash run/fcmae_mask_sweep.sh RECIPE [key=value ...] [-- SETTING ...]
#   TRAIN=digits/train VAL=digits/val bash run/fcmae_mask_sweep.sh digits_fcmae train.epochs=10 \
#       -- "fcmae.mask_ratio=0.3" "fcmae.mask_ratio=0.6" "fcmae.mask_patch=16 fcmae.mask_ratio=0.5"
#
# A SETTING is one word of key=value pairs with blanks between; key=value before -- is common to all. Without any: mask
#   ratios 0.4 to 0.8. Mask patches of 16, 32 and 64 pixels need images that all divide, data.image_size=256, and for
#   patches below the encoder's stride of 32 one of "fcmae.mask_patch=16 encoder.kwargs.output_stride=16" (a finer
#   encoder) and "fcmae.mask_patch=16 fcmae.backend=dense" (the same one, which then sees through the mask).
# Folders below TRAIN and VAL are classes, for the k-NN. OUT: folder of the runs (default output/fcmae_mask_sweep);
#   what is finished in it is not run again. Any other setting can be swept the same way, such as fcmae.grn=none.
# Hardware: as run/pretrain.sh; a few minutes a setting for the digits on 2 CPU cores, days on ImageNet-1K with 8 GPUs.
# Result: a table of reconstruction_loss (of the target the setting asks for), reconstruction_mse (of [0, 1] pixels, the
#   same scale for every setting) and top-1 of the k-NN.
set -euo pipefail
: "${TRAIN:?folder of the training images, one folder a class}" "${VAL:?folder of the validation images, one folder a class}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
out=${OUT:-output/fcmae_mask_sweep}
recipe=${1:-fcmae_convnextv2_base}
[ $# -eq 0 ] || shift
common=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    common+=("$1")
    shift
done
[ $# -eq 0 ] || shift
settings=("$@")
if [ ${#settings[@]} -eq 0 ]; then
    settings=(fcmae.mask_ratio=0.4 fcmae.mask_ratio=0.5 fcmae.mask_ratio=0.6 fcmae.mask_ratio=0.7 fcmae.mask_ratio=0.8)
fi
images=("data.path=$TRAIN" "data.val_path=$VAL")
table() {
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$root/.venv/bin/python" -m run.sweep_table "$@"
}

folders=()
failed=()
for setting in "${settings[@]}"; do
    read -ra words <<<"$setting"
    folder=$out/${setting//[^A-Za-z0-9._=-]/_}
    # One setting that does not work is named at the end; what the others measured is shown all the same.
    if ! launch pretrain "$recipe" "${images[@]}" "output_dir=$folder" "${common[@]}" "${words[@]}"; then
        failed+=("$setting")
        continue
    fi
    folders+=("$folder")
    mapfile -t as_trained < <(table --knn "$folder")
    launch finetune knn "${images[@]}" "${as_trained[@]}" data.eval_crop_ratio=1.0 "encoder.pretrained=$folder" \
        "output_dir=$folder/knn" || failed+=("$setting (k-NN)")
done
[ ${#folders[@]} -eq 0 ] || table "${folders[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'fcmae_mask_sweep: failed, see above: %s\n' "${failed[@]}" >&2
    exit 1
fi
