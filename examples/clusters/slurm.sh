#!/bin/bash
# Train on 8 nodes of 8 GPUs: sbatch examples/clusters/slurm.sh
# Set BUNDLE, DATA and RUN, all on storage that the nodes share, and PYTHON.
#SBATCH --job-name=framepack
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# SIGTERM two minutes before the time limit: the run saves a checkpoint and ends with code 143.
#SBATCH --signal=TERM@120
# After the failure of a node, SLURM starts the job again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

PYTHON=${PYTHON:-.venv/bin/python}
: "${BUNDLE:?the bundle to train}" "${DATA:?a dataset of framepack prepare}" "${RUN:?the run folder}"

# Bash handles a signal only after `wait`, and not while a command runs in the foreground.
stopped=
trap 'stopped=1; kill -TERM $! 2>/dev/null' TERM

# One process a node, which takes all its GPUs. `launch` restarts it after a failure. The step must
# not be ended at the first process that fails: the others notice, and all start again.
srun --kill-on-bad-exit=0 "$PYTHON" -m framepack_jax launch -- \
    train.py --config configs/finetune_i2v.py --bundle "$BUNDLE" --data.path "$DATA" \
    --output "$RUN" --batch 64 --coordinator-address auto &
# A signal may have come before there was a process to hand it on to.
[ -z "$stopped" ] || kill -TERM $!
wait $!
code=$?
while kill -0 $! 2>/dev/null; do
    wait $!
    code=$?
done

case $code in
0) echo "finished" ;;
143)
    # Stopped by the time limit or by preemption: continue in another job.
    echo "stopped; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
2) echo "the flags or the data are wrong; see the line that begins with error:" ;;
*) echo "failed three times at one step (exit code $code)" ;;
esac
exit $code
