# shellcheck shell=bash
# rolls out and trains on the GPU: tests group_attention, group_decode, the engine with CUDA graphs and short runs, measures steps and rates of Qwen2.5-VL's shapes
tests=(tests/gpu/test_group_attention_gpu.py tests/gpu/test_group_decode_gpu.py tests/gpu/test_rollout_gpu.py tests/gpu/test_embed_cache_gpu.py tests/gpu/test_layers_gpu.py tests/gpu/test_train_gpu.py)
tests+=(-q -rs -p no:cacheprovider -p no:randomly --durations=5)

say "tests"
part 150 "$PYTHON" -m pytest "${tests[@]}"

measure rollout 380
