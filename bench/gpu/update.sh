# shellcheck shell=bash
# updates on the GPU: tests group_attention, measures steps of Qwen2.5-VL's shapes beside replicated rows
tests=(tests/gpu/test_group_attention_gpu.py -q -rs -p no:cacheprovider -p no:randomly --durations=5)

say "tests"
part 120 "$PYTHON" -m pytest "${tests[@]}"

measure update 300 --rounds 2
