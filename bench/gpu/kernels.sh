# shellcheck shell=bash
# builds csrc/, tests vrlt_kernels in bf16, measures it beside its peers, then alone over N, then launch configurations
small="${GPU_CHECK_SMALL:-}"
tests=(tests/gpu/test_kernels_gpu.py -q -p no:cacheprovider -m gpu --durations=5)
bench=(-m bench kernels)

if [ -n "$small" ]; then
  bench+=(--small --no-memory --no-lengths --arm 'ours*' --arm 'eager*' --out "$OUT/kernels.cpu.json" --device cpu)
else
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
  "$PYTHON" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, 'CUDA', torch.version.cuda)"
  if command -v nvcc >/dev/null; then
    say "build csrc/"
    VRLT_NATIVE=1 part 120 "$PYTHON" setup.py -q build_ext --inplace
  else
    say "no nvcc: csrc/ isn't built"
  fi
  "$PYTHON" -c "from vrlt_kernels import _native; print('native:', _native.available(), _native.reason())"
fi

# most of their time is Triton's compiler, on the CPU
"$PYTHON" -c "import xdist" 2>/dev/null && [ -z "$small" ] && tests+=(-n 8)
say "tests"
part 150 "$PYTHON" -m pytest "${tests[@]}"

say "measure"
if [ -z "$small" ]; then
  # the last cell that is begun takes 30 s at most
  bench+=(--out "$OUT/kernels.$("$PYTHON" -c 'import torch; from bench.measure import device_name as n; print(n(torch.device("cuda")))').json")
  bench+=(--minutes "$("$PYTHON" -c "print(round((380 - $SECONDS) / 60, 2))")")
fi
part $((425 - SECONDS)) "$PYTHON" "${bench[@]}"

if [ -z "$small" ]; then
  say "launch configurations"
  name="$("$PYTHON" -c 'import torch; from bench.measure import device_name as n; print(n(torch.device("cuda")))')"
  part $((475 - SECONDS)) "$PYTHON" -m bench rows --minutes "$("$PYTHON" -c "print(round((460 - $SECONDS) / 60, 2))")" --out "$OUT/rows.$name.json"
fi
