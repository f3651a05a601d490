#!/usr/bin/env bash
# Fail when a file handed in is larger than 500 kB: weights and data do not belong into the history.
status=0
for file in "$@"; do
  if [ "$(wc -c <"$file")" -gt 512000 ]; then
    echo "$file is larger than 500 kB"
    status=1
  fi
done
exit $status
