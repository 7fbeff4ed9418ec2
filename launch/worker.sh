#!/bin/bash
# Runs on each TPU worker; launch.tpu calls it as `worker.sh setup|start|status|follow LINE|last LINES|stop`.
# settings.sh in the same folder defines BUCKET, MOUNT, PYTHON, WHEEL, EXTRAS, LOGS and COMMAND.
set -euo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./settings.sh

setup() {
  if ! mountpoint --quiet "$MOUNT"; then
    if ! command -v gcsfuse > /dev/null; then
      local keys=/usr/share/keyrings/cloud.google.asc
      curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg |
        sudo tee "$keys" > /dev/null
      echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
      sudo apt-get update --quiet
      sudo apt-get install --yes --quiet --option=DPkg::Lock::Timeout=300 gcsfuse
    fi
    sudo mkdir -p "$MOUNT"
    sudo chown "$(id -u):$(id -g)" "$MOUNT"
    # Without the metadata cache, workers see immediately what another worker has written.
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "$BUCKET" "$MOUNT"
  fi
  local uv="$HOME/.local/bin/uv"
  if [ ! -x "$uv" ]; then
    curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
  fi
  "$uv" venv --quiet --allow-existing --python "$PYTHON" venv
  "$uv" pip install --quiet --python venv/bin/python "famx[$EXTRAS] @ file://$PWD/$WHEEL"
}

# Whether the training process is alive.
running() {
  [ -f pid ] && [ ! -f exit_code ] && kill -0 "$(cat pid)" 2> /dev/null
}

# Starts `train` in the background, in a session that outlives the connection; once only.
start() {
  if running; then
    return
  fi
  rm -f exit_code
  setsid nohup bash ./worker.sh train > log 2>&1 < /dev/null &
  echo "$!" > pid
}

# Copies the log to the bucket; one that cannot be reached is no reason to stop.
keep_log() {
  mkdir -p "$LOGS" && cp log "$LOGS/.$1.new" && mv "$LOGS/.$1.new" "$LOGS/$1" || true
}

# Runs the training, keeps its log every minute and at the end, and records its exit code; renaming makes
# the file appear complete.
train() {
  . ./environment.sh
  local code=0 name
  name="$(date --utc +%Y%m%dT%H%M%SZ)-$(hostname).log"
  while true; do
    for _ in $(seq 60); do sleep 1; done  # so that no sleep stays for long once the loop is ended
    keep_log "$name"
  done &
  local keeper=$!
  "${COMMAND[@]}" || code=$?
  kill "$keeper" 2> /dev/null || true
  keep_log "$name"
  echo "$code" > exit_code.new
  mv exit_code.new exit_code
}

# Prints `exited CODE`, `running`, `lost` (died without an exit code) or `absent` (never started).
status() {
  if [ -f exit_code ]; then
    echo "exited $(cat exit_code)"
  elif running; then
    echo running
  elif [ -f pid ]; then
    echo lost
  else
    echo absent
  fi
}

# Prints the log from a line on until the training ends.
follow() {
  tail --lines="+$1" --sleep-interval=0.5 --pid="$(cat pid)" --follow log
}

# Prints how the training ended here, and the last lines of its log unless it ended well (0), was stopped
# (42), or only because another process was lost (75).
last() {
  local state
  state="$(status)"
  echo "--- $(hostname): $state"
  case "$state" in
    "exited 0" | "exited 42" | "exited 75" | absent) ;;
    *) tail --lines="$1" log ;;
  esac
}

# Tells the training to save and stop, and waits up to five minutes.
stop() {
  if running; then
    pkill -TERM --parent "$(cat pid)" || true
    for _ in $(seq 300); do
      running || break
      sleep 1
    done
  fi
}

"$@"
