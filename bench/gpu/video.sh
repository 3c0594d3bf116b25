# shellcheck shell=bash
# decodes videos on the GPU: says whether libnvcuvid loads, tests the decoders, measures cells H1 to H5
small="${GPU_CHECK_SMALL:-}"
tests=(tests/gpu/test_patchify_gpu.py tests/gpu/test_video_gpu.py tests/video/test_remux.py tests/video/test_backends.py tests/video/test_dali.py)
tests+=(-q -rs -p no:cacheprovider -p no:randomly --durations=5)
# most of patchify's time is Triton's compiler, on the CPU
"$PYTHON" -c "import xdist" 2>/dev/null && [ -z "$small" ] && tests+=(-n 6)
bench=(-m bench video_gpu --out "$OUT" --work "${TMPDIR:-/tmp}/vrlt-bench-video")

say "decoders"
# torchcodec takes FFmpeg's libraries under their usual names; PyAV's wheel has them under others
LD_LIBRARY_PATH="$("$PYTHON" -c '
import os, pathlib, tempfile
from bench.video_process import _ffmpeg_links
print(_ffmpeg_links(pathlib.Path(tempfile.gettempdir()) / "vrlt-bench-video"))')" || true
export LD_LIBRARY_PATH
"$PYTHON" -c '
import ctypes
try:
    ctypes.CDLL("libnvcuvid.so.1"); print("libnvcuvid loads")
except OSError as error:
    print("libnvcuvid does not load:", error)
from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.dali import DaliBackend
from vrlt_fast.video.backends.torchcodec import TorchcodecBackend
for backend in (DaliBackend("cuda"), TorchcodecBackend("cuda"), DaliBackend("cpu"), TorchcodecBackend("cpu")):
    print(backend.name, backend.device, backend.availability())
for codec in ("h264", "hevc", "vp9", "av1"):
    for depth in (8, 10):
        print(codec, depth, "bits:", nvdec.capability(codec, "420", depth))
'
[ -n "$small" ] || nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true

say "tests"
part 170 "$PYTHON" -m pytest "${tests[@]}"

say "measure"
if [ -n "$small" ]; then
  bench+=(--small --device cpu --workers 1)
else
  # the last cell that is begun takes a minute at most
  bench+=(--minutes "$("$PYTHON" -c "print(round((400 - $SECONDS) / 60, 2))")")
fi
part $((470 - SECONDS)) "$PYTHON" "${bench[@]}"
