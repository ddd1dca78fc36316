#!/usr/bin/env bash
# Starts NPROC local processes that train together:
#   NPROC=2 launch/torchrun.sh -m ltx2_train.cli.train model.name=demo
# SIGTERM, SIGINT and SIGUSR1 reach every worker, which saves and exits, as a single process would.
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "usage: [NPROC=n] launch/torchrun.sh -m ltx2_train.cli.train [settings]" >&2
  exit 64
fi

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/../.venv/bin/python}"
if ! command -v "$python" >/dev/null 2>&1; then
  python=python3
fi

gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then
  gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
fi
if [ "$gpus" -eq 0 ]; then
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi
processes="${NPROC:-$((gpus > 0 ? gpus : 1))}"

# Threads per process: the cores shared evenly. torchrun itself would fall back to one.
cores="$(nproc)"
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# torchrun passes the signal on and kills what is left after this many seconds: room for the last checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE_SECONDS:-600}"
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$@"
