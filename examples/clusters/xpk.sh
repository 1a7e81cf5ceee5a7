#!/bin/bash
# Train on a TPU slice with XPK, which writes the JobSet: examples/clusters/xpk.sh
# Set CLUSTER, ZONE, PROJECT, IMAGE (with framepack-jax[tpu,gcs] in it) and BUCKET (gs://...).
set -e
: "${CLUSTER:?}" "${ZONE:?}" "${PROJECT:?}" "${IMAGE:?}" "${BUCKET:?}"
xpk workload create --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" \
    --workload framepack --tpu-type v5p-128 --num-slices 1 --docker-image "$IMAGE" \
    --max-restarts 100 --restart-on-exit-codes 1,134,137,139 \
    --termination-grace-period-seconds 300 \
    --command "python -m framepack_jax launch -- train.py --config configs/finetune_i2v.py \
        --bundle $BUCKET/framepack_i2v_hy --data.path $BUCKET/dataset \
        --output $BUCKET/runs/finetune --batch 64 --coordinator-address auto --stop-seconds 280"
