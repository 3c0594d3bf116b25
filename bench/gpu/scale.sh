# shellcheck shell=bash
# one long group on one GPU, and what it says of eight: rollout and update of 256 to 4096 frames
measure scale 300
