#!/usr/bin/env bash
# Starts the processes of one node that train together, alone or with other nodes that run the same command:
#   NPROC=2 launch/torchrun.sh -m ltx2_train.cli.train model.name=demo
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh -m ltx2_train.cli.train ...    # and NODE_RANK=1 on node1
# SIGTERM, SIGINT and SIGUSR1 reach every worker, which saves and exits, as a single process would.
# launch/README.md lists the variables; those that Kubeflow (PET_*) and SLURM set are understood.
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "usage: [NPROC=n] [NNODES=n NODE_RANK=i MASTER_ADDR=host] launch/torchrun.sh -m ltx2_train.cli.train [settings]" >&2
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
processes="${NPROC:-${PET_NPROC_PER_NODE:-auto}}"
case "$processes" in
  auto | gpu) processes=$((gpus > 0 ? gpus : 1)) ;;
  cpu) processes="$(nproc)" ;;
esac

nodes="${NNODES:-${PET_NNODES:-1}}"
if [ "$nodes" = 1 ]; then
  rendezvous=(--standalone)
  if [ "$gpus" -eq 0 ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
  fi
else
  address="${MASTER_ADDR:-${PET_MASTER_ADDR:-}}"
  node="${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}"
  if [ -z "$address" ] || [ -z "$node" ]; then
    echo "launch/torchrun.sh: NNODES=$nodes needs MASTER_ADDR (name or address of node 0) and NODE_RANK (0 there)" >&2
    exit 64
  fi
  # Node 0 keeps the meeting place. The others may be up long before it, and it long before them.
  wait_seconds="${JOIN_SECONDS:-1800}"
  is_host=$([ "$node" = 0 ] && echo true || echo false)
  rendezvous=(
    --nnodes "$nodes"
    --rdzv-backend c10d
    --rdzv-endpoint "$address:${MASTER_PORT:-${PET_MASTER_PORT:-29500}}"
    --rdzv-id "${RDZV_ID:-ltx2}"
    --rdzv-conf "is_host=$is_host,join_timeout=$wait_seconds,read_timeout=$wait_seconds"
  )
  if [ -n "${LOCAL_ADDR:-}" ]; then
    rendezvous+=(--local-addr "$LOCAL_ADDR")
  fi
fi

# Threads per process: the cores shared evenly. torchrun itself would fall back to one.
cores="$(nproc)"
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# A store for every start of the workers. The agent's own, which they would share, outlives a restart: a worker can find
# the address that another one had before it was killed, and torchrun then fails to start them again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun passes the signal on and kills what is left after this many seconds: room for the last checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE_SECONDS:-600}"
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

exec "$python" -m torch.distributed.run "${rendezvous[@]}" \
  --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" "$@"
