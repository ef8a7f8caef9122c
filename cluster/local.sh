#!/usr/bin/env bash
# A head and two workers on this machine, as three Ray nodes with their own raylets; Ctrl-C stops them.
#   cluster/local.sh            then, in another shell, with the variables that it prints:
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
  for node in "${nodes[@]:1}" "${nodes[0]}"; do  # the head last, because a worker without a head waits for one
    kill -TERM "$node" 2>/dev/null || true
    wait "$node" || true
  done
  rm -rf "$folder"
}
trap stop EXIT INT TERM

await() {  # wait until the node with log file $1 and process id $2 runs
  for _ in $(seq 240); do
    grep -q "Ray runtime started" "$1" && return
    kill -0 "$2" 2>/dev/null || break
    sleep 0.5
  done
  cat "$1" >&2
  exit 1
}

common=(--block --num-cpus "$CPUS" --object-store-memory "$STORE" --disable-usage-stats)
$RAY start --head "${common[@]}" --node-ip-address 127.0.0.1 --port "$PORT" \
  --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" --ray-client-server-port "$CLIENT_PORT" > "$folder/head.log" 2>&1 &
nodes+=($!)
await "$folder/head.log" "${nodes[0]}"
for number in 1 2; do  # one by one: two nodes that start at once would take the same sockets and fail
  $RAY start --address "127.0.0.1:$PORT" "${common[@]}" --node-ip-address 127.0.0.1 > "$folder/worker-$number.log" 2>&1 &
  nodes+=($!)
  await "$folder/worker-$number.log" "${nodes[$number]}"
done

echo "export RAY_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
echo "nodes: ${nodes[*]}"
wait
