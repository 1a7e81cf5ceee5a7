#!/bin/bash
# Train on a TPU slice without Kubernetes: request it, and start a service on each of its hosts. The
# service goes on when the ssh client is gone, and starts again when a host does.
#   examples/clusters/queued_resource.sh create     then, once it is ACTIVE:
#   examples/clusters/queued_resource.sh start | log | stop | delete
# Set NAME, ZONE, PROJECT, and BUCKET (gs://...). The clone is at ~/framepack-jax of each host.
set -e
: "${NAME:?}" "${ZONE:?}" "${PROJECT:?}" "${BUCKET:?}"
TYPE=${TYPE:-v5p-128} RUNTIME=${RUNTIME:-v2-alpha-tpuv5}

on_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --project "$PROJECT" --worker=all \
        --command "$1"
}

case $1 in
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --project "$PROJECT" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
    ;;
start)
    on_hosts "
        cd ~/framepack-jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]' &&
        sudo tee /etc/systemd/system/framepack.service >/dev/null <<SERVICE
[Unit]
Description=Training of framepack-jax
After=network-online.target
Wants=network-online.target
[Service]
User=\$USER
WorkingDirectory=\$HOME/framepack-jax
ExecStart=\$HOME/framepack-jax/.venv/bin/python -m framepack_jax launch -- train.py \\
    --config configs/finetune_i2v.py --bundle $BUCKET/framepack_i2v_hy \\
    --data.path $BUCKET/dataset --output $BUCKET/runs/finetune --batch 64 \\
    --coordinator-address auto --stop-seconds 110
# A failure of launch itself; not the end of the run, wrong flags, or a stop.
Restart=on-failure
RestartPreventExitStatus=2 130 143
SuccessExitStatus=143
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=120
[Install]
WantedBy=multi-user.target
SERVICE
        sudo systemctl daemon-reload && sudo systemctl enable --now framepack"
    ;;
log) on_hosts "journalctl -u framepack -n 20 --no-pager" ;;
stop) on_hosts "sudo systemctl disable --now framepack" ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --project "$PROJECT" \
        --force --quiet
    ;;
*) echo "usage: $0 create | start | log | stop | delete" >&2 && exit 2 ;;
esac
