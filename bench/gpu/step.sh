# shellcheck shell=bash
# whole steps on the GPU: from demo videos to new weights of Qwen2.5-VL-7B's shape, beside replicated practice
measure step 300 --rounds 2
