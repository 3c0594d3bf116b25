// patchify_core.h with every instruction set that the machine has: against plain sums in 64 bits, with each row of the
// source in a buffer of its own size, so that the sanitizer sees a read behind the last one.
#include "patchify_core.h"

#include <algorithm>
#include <memory>

#include "check.h"

using namespace vrlt_patch;

namespace {

struct Table {
  std::vector<int32_t> low, end;
  std::vector<int16_t> weights;
  int64_t taps, source;
  int precision;

  Axis axis() const {
    return {low.data(), end.data(), weights.data(), static_cast<int64_t>(low.size()), taps, source, precision, true};
  }
  int16_t at(int64_t out, int64_t pixel) const {
    const bool inside = pixel >= low[out] && pixel < end[out];
    return inside ? weights[out * taps + pixel - low[out]] : int16_t(0);
  }
};

// Windows that move along the source, with any weights: also negative ones, and some that no two bytes hold.
Table table(int64_t source, int64_t out, int64_t taps, bool wide, std::mt19937& generator) {
  Table t = {{}, {}, {}, std::min(taps, source), source, 15};
  const int64_t most = t.taps;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t low = std::max<int64_t>(std::min(i * source / out, source - 1) - generator() % 3, 0), count = 1 + generator() % most;
    t.low.push_back(static_cast<int32_t>(low));
    t.end.push_back(static_cast<int32_t>(std::min(low + count, source)));
    for (int64_t k = 0; k < most; ++k) {
      const int value = static_cast<int>(generator() % 50000) - 10000;
      t.weights.push_back(static_cast<int16_t>(low + k >= t.end.back() ? 0 : wide ? std::min(value, 32767) : value / 2));
    }
  }
  return t;
}

int64_t clamped(int64_t sum, int precision) {
  const int64_t level = (sum + (int64_t(1) << precision >> 1)) >> precision;
  return std::min<int64_t>(std::max<int64_t>(level, 0), 255);
}

std::vector<uint8_t> truth(const uint8_t* rgb, int64_t row, const Table& x, const Table& y) {
  const int64_t height = y.source, wide = static_cast<int64_t>(x.low.size()), tall = static_cast<int64_t>(y.low.size());
  std::vector<int64_t> lines(height * wide * 3);
  for (int64_t r = 0; r < height; ++r)
    for (int64_t i = 0; i < wide; ++i)
      for (int64_t c = 0; c < 3; ++c) {
        int64_t sum = 0;
        for (int64_t p = x.low[i]; p < x.end[i]; ++p) sum += x.at(i, p) * rgb[r * row + 3 * p + c];
        lines[(r * wide + i) * 3 + c] = clamped(sum, x.precision);
      }
  std::vector<uint8_t> out(tall * wide * 3);
  for (int64_t j = 0; j < tall; ++j)
    for (int64_t i = 0; i < wide * 3; ++i) {
      int64_t sum = 0;
      for (int64_t p = y.low[j]; p < y.end[j]; ++p) sum += y.at(j, p) * lines[p * wide * 3 + i];
      out[j * wide * 3 + i] = static_cast<uint8_t>(clamped(sum, y.precision));
    }
  return out;
}

void one(Level level, int64_t height, int64_t width, int64_t taps, bool wide, std::mt19937& generator) {
  const int64_t p = 2 + generator() % 15, m = 1 + generator() % 2, tubelet = 1 + generator() % 2;
  const int64_t tall = p * m * (1 + generator() % 2), across = p * m * (1 + generator() % 3), row = 3 * width;
  const Table x = table(width, across, taps, wide, generator), y = table(height, tall, taps, wide, generator);
  std::unique_ptr<uint8_t[]> rgb(new uint8_t[height * row]);
  for (int64_t i = 0; i < height * row; ++i) rgb[i] = static_cast<uint8_t>(generator());
  std::vector<std::unique_ptr<char[]>> plans;
  for (const bool vertical : {false, true}) {
    const Axis axis = (vertical ? y : x).axis();
    plans.emplace_back(new char[plan_bytes(axis, vertical, level)]);
    build_plan(axis, vertical, level, plans.back().get());
  }
  const int64_t rows = tall / p * (across / p), columns = 3 * tubelet * p * p;
  std::unique_ptr<char[]> out(new char[rows * columns]);
  memset(out.get(), 0x5a, rows * columns);
  Source source = {};
  source.data = rgb.get(), source.row = row, source.column = 3, source.channel = 1;
  source.height = height, source.width = width;
  const Layout layout = {tall, across, p, m, tubelet, out.get(), columns, 1, nullptr};
  const int64_t slot = tubelet - 1, half = tall / p / 2;
  patchify_rows(source, layout, Plan(plans[0].get()), Plan(plans[1].get()), slot, half, tall / p);
  patchify_rows(source, layout, Plan(plans[0].get()), Plan(plans[1].get()), slot, 0, half);
  const std::vector<uint8_t> want = truth(rgb.get(), row, x, y);
  for (int64_t j = 0; j < tall; ++j)
    for (int64_t i = 0; i < across; ++i)
      for (int64_t c = 0; c < 3; ++c) {
        const int64_t by = j / p, bx = i / p, patch = ((by / m) * (across / p / m) + bx / m) * m * m + by % m * m + bx % m;
        const int64_t at = patch * columns + ((c * tubelet + slot) * p + j % p) * p + i % p;
        check(static_cast<uint8_t>(out[at]) == want[(j * across + i) * 3 + c], "level " + std::to_string(int(level)));
      }
  for (int64_t t = 0; t + 1 < tubelet; ++t)  // the other frame of the tubelet is as it was
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t k = 0; k < p * p; ++k) check(out[r * columns + (c * tubelet + t) * p * p + k] == 0x5a, "guard");
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 generator(static_cast<unsigned>(std::stoul(arguments[1])));
  for (const Level level : {Level::generic, Level::avx2, Level::vbmi}) {
    if (functions_for(level) == nullptr) continue;
    for (int64_t i = 0; i < 60; ++i)
      one(level, 1 + generator() % 90, 1 + generator() % 120, 1 + generator() % 30, i % 5 == 0, generator);
  }
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
