#!/usr/bin/env bash
# A head and two workers on this machine, as three Ray nodes with their own raylets; Ctrl-C ends them.
#   cluster/local.sh            then, elsewhere, with the two variables that it prints:
#   ray job submit --working-dir . -- python jobs/audit.py --input s3://bucket/images/ --output s3://bucket/audit/
set -euo pipefail

RAY=${RAY:-ray}
PORT=${PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
CLIENT_PORT=${CLIENT_PORT:-10001}
CPUS=${CPUS:-4}            # logical CPUs of each node; they may exceed the cores
STORE=${STORE:-300000000}  # bytes of object store of each node

export PATH=$(dirname "$(command -v "$RAY")"):$PATH  # jobs run the `python` beside `ray`
export RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_MODE=token
umask 077
folder=$(mktemp -d)
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$folder/token}
[ -s "$RAY_AUTH_TOKEN_PATH" ] || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

nodes=()
stop() {
  trap - EXIT INT TERM
  for node in "${nodes[@]:1}" "${nodes[0]}"; do  # the head last: workers without one wait for it
    kill -TERM "$node" 2>/dev/null || true
    wait "$node" || true
  done
  rm -rf "$folder"
}
trap stop EXIT INT TERM

common=(--block --num-cpus "$CPUS" --object-store-memory "$STORE" --disable-usage-stats)
$RAY start --head "${common[@]}" --node-ip-address 127.0.0.1 --port "$PORT" \
  --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" --ray-client-server-port "$CLIENT_PORT" > "$folder/head.log" 2>&1 &
nodes+=($!)
for _ in $(seq 120); do
  $RAY status --address "127.0.0.1:$PORT" > /dev/null 2>&1 && break
  kill -0 "${nodes[0]}" 2>/dev/null || { cat "$folder/head.log" >&2; exit 1; }
  sleep 0.5
done
for number in 1 2; do
  $RAY start --address "127.0.0.1:$PORT" "${common[@]}" --node-ip-address 127.0.0.1 > "$folder/worker-$number.log" 2>&1 &
  nodes+=($!)
done

echo "export RAY_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
echo "nodes: ${nodes[*]}"
wait
