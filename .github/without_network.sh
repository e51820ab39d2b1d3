#!/usr/bin/env bash
# Run a command with loopback as the only network, as the calling user.
set -euo pipefail
sudo unshare --net -- bash -c 'ip link set lo up && exec setpriv --reuid "$0" --regid "$1" --init-groups env HOME="$2" PATH="$3" "${@:4}"' \
  "$(id -u)" "$(id -g)" "$HOME" "$PATH" "$@"
