# shellcheck shell=bash
# updates on the GPU: tests group_attention, measures steps of Qwen2.5-VL's shapes beside replicated rows
small="${GPU_CHECK_SMALL:-}"
tests=(tests/gpu/test_group_attention_gpu.py -q -rs -p no:cacheprovider -p no:randomly --durations=5)
bench=(-m bench update --out "$OUT" --rounds 2)

say "tests"
part 120 "$PYTHON" -m pytest "${tests[@]}"

say "measure"
if [ -n "$small" ]; then
  bench+=(--small --device cpu)
else
  bench+=(--minutes "$("$PYTHON" -c "print(round((300 - $SECONDS) / 60, 2))")")
fi
part $((470 - SECONDS)) "$PYTHON" "${bench[@]}"
