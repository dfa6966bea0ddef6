#!/usr/bin/env bash
# A Ray cluster on this machine, every node a raylet of its own, with token authentication. Linux only.
#
#   cluster/local.sh up [--nodes N] [--cpus C] [--port P] [--dashboard-port P]
#   cluster/local.sh status
#   cluster/local.sh down
#
# `up` starts what is missing and leaves what runs alone: 2 nodes of 1 CPU, GCS at 6379, dashboard and job server at
# 8265, both for this machine. `down` ends these nodes and no other cluster. Logs and the token are in
# DBTRAIN_LOCAL_CLUSTER, /tmp/dbtrain-cluster-UID by default. GPUs are left out: for one machine with GPUs
# `dbtrain train --backend ray` brings up a cluster by itself.
set -euo pipefail

folder=${DBTRAIN_LOCAL_CLUSTER:-/tmp/dbtrain-cluster-$UID}
start_seconds=120
stop_seconds=20
nodes=2
cpus=1
port=6379
dashboard_port=8265

die() {
  echo "cluster/local.sh: $2" >&2
  exit "$1"
}

# The processes of a node: all that carry its mark in their environment, agents and workers too.
processes() {
  # grep fails over the processes of others, whose environment it may not read.
  { grep --files-with-matches --no-messages --null-data --line-regexp --fixed-strings \
    "DBTRAIN_CLUSTER_NODE=$folder/$1" /proc/[0-9]*/environ || true; } | cut -d / -f 3
}

# Whether a node's `ray start` watches over it; without that one its processes are on their way out.
runs() {
  local pid
  pid=$(cat "$folder/$1.pid" 2>/dev/null) && grep --quiet --line-regexp "$pid" <<<"$(processes "$1")"
}

prepare_folder() {
  # Sockets get names of some 65 letters below the folder, and the system takes 107.
  [[ $folder == /* ]] || die 2 "DBTRAIN_LOCAL_CLUSTER=$folder is not an absolute path"
  ((${#folder} <= 40)) || die 2 "the path $folder is too long for Ray's sockets; set DBTRAIN_LOCAL_CLUSTER to a shorter one"
  (umask 077 && mkdir -p "$folder")
  [[ -O $folder ]] || die 2 "$folder belongs to somebody else; set DBTRAIN_LOCAL_CLUSTER to a folder of yours"
  if [[ ! -s $folder/token ]]; then
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token")
  fi
  cat >"$folder/env" <<EOF
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH='$folder/token'
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
EOF
  # shellcheck source=/dev/null
  source "$folder/env"
}

start_node() {
  local number=$1 log=$folder/$1.log
  shift
  echo "starting node $number with $cpus CPUs; log: $log"
  # Nodes of one machine must not want the same ports: 0 leaves them to the system.
  DBTRAIN_CLUSTER_NODE=$folder/$number setsid ray start "$@" \
    --node-ip-address=127.0.0.1 --num-cpus="$cpus" --num-gpus=0 --object-store-memory=104857600 \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 \
    --temp-dir="$folder/$number" --disable-usage-stats --log-color=false --block >"$log" 2>&1 </dev/null &
  echo $! >"$folder/$number.pid"
  disown
}

wait_for_node() {
  local number=$1 log=$folder/$1.log deadline=$((SECONDS + start_seconds))
  until grep --quiet 'Ray runtime started' "$log"; do
    if ! kill -0 "$(cat "$folder/$number.pid")" 2>/dev/null; then
      tail -n 20 "$log" >&2
      die 1 "node $number did not start"
    fi
    ((SECONDS < deadline)) || die 1 "node $number has not started within $start_seconds s; see $log"
    sleep 0.3
  done
}

end_node() {
  local number=$1 deadline pids
  pids=$(processes "$number")
  if [[ -n $pids ]]; then
    echo "ending node $number"
    # `ray start --block` takes its processes along. Where it has died, somebody else may have its number.
    if runs "$number"; then
      kill "$(cat "$folder/$number.pid")" 2>/dev/null || true
    fi
    deadline=$((SECONDS + stop_seconds))
    while pids=$(processes "$number") && [[ -n $pids ]]; do
      if ((SECONDS >= deadline)); then
        # shellcheck disable=SC2086  # one argument a process
        kill -KILL $pids 2>/dev/null || true
      fi
      sleep 0.2
    done
  fi
  rm -rf -- "${folder:?}/$number" "$folder/$number.pid" "$folder/$number.log"
}

known_nodes() {
  find "$folder" -maxdepth 1 -name '[0-9]*.pid' -printf '%f\n' 2>/dev/null | sed -n 's/^\([0-9]*\)\.pid$/\1/p' |
    sort --numeric-sort
}

up() {
  local number started=()
  command -v ray >/dev/null || die 2 "there is no ray command; activate the environment that dbtrain is installed in"
  prepare_folder
  if ! runs 0; then
    down_nodes # what is left of a cluster without its head
    start_node 0 --head --port="$port" --include-dashboard=true --dashboard-host=127.0.0.1 \
      --dashboard-port="$dashboard_port"
    wait_for_node 0
    echo "127.0.0.1:$port http://127.0.0.1:$dashboard_port" >"$folder/address"
  fi
  for ((number = 1; number < nodes; number++)); do
    if ! runs "$number"; then
      end_node "$number"
      start_node "$number" --address="$(cut -d ' ' -f 1 "$folder/address")"
      started+=("$number")
    fi
  done
  for number in "${started[@]}"; do
    wait_for_node "$number"
  done
  status
}

down_nodes() {
  local number
  # The head last: nodes without one take a minute to give up.
  for number in $(known_nodes | tac); do
    end_node "$number"
  done
}

status() {
  local number live=0 gcs jobs
  for number in $(known_nodes); do
    if runs "$number"; then
      live=$((live + 1))
    else
      echo "node $number has died; log: $folder/$number.log"
    fi
  done
  if ! runs 0; then
    echo "no cluster runs from $folder"
    return 1
  fi
  read -r gcs jobs <"$folder/address"
  cat <<EOF
$live nodes run. Before using them:
  source $folder/env
then
  dbtrain train CONFIG --run DIR --address $gcs
  dbtrain submit CONFIG --address $jobs
EOF
}

count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die 2 "$1 $2 is not a whole number above 0"
}

verb=${1:-}
shift || true
while (($#)); do
  [[ $verb == up ]] || die 2 "$verb takes no options"
  (($# > 1)) || die 2 "$1 needs a value"
  case $1 in
    --nodes) count "$1" "$2" && nodes=$2 ;;
    --cpus) count "$1" "$2" && cpus=$2 ;;
    --port) count "$1" "$2" && port=$2 ;;
    --dashboard-port) count "$1" "$2" && dashboard_port=$2 ;;
    *) die 2 "there is no option $1" ;;
  esac
  shift 2
done
case $verb in
  up) up ;;
  status) status ;;
  down)
    down_nodes
    # Whatever else lies there is not ours.
    rm -f -- "$folder/token" "$folder/env" "$folder/address"
    rmdir -- "$folder" 2>/dev/null || true
    echo "no node is left"
    ;;
  *) die 2 "say up, status or down" ;;
esac
