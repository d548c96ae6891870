#include "enlarge.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace fastad {
namespace {

constexpr int64_t kStripValues = 1 << 16;  // of the output: 256 KiB, worth waking a thread

void widen_row(const float* row, const std::vector<Lerp>& columns, float* out) {
  for (size_t x = 0; x < columns.size(); ++x) {
    out[x] = lerp(row[columns[x].first], row[columns[x].second], columns[x].weight);
  }
}

}  // namespace

std::vector<Lerp> lerps(int in, int out) {
  std::vector<Lerp> result(out);
  const double scale = static_cast<double>(in) / out;
  for (int i = 0; i < out; ++i) {
    const double at = std::max((i + 0.5) * scale - 0.5, 0.0);
    const int first = std::min(static_cast<int>(at), in - 1);
    result[i] = {first, std::min(first + 1, in - 1), static_cast<float>(at - first)};
  }
  return result;
}

void resize_map(const float* map, int in_height, int in_width, float* out, int out_height,
                int out_width) {
  if (in_height == out_height && in_width == out_width) {
    std::memcpy(out, map, sizeof(float) * in_height * in_width);
    return;
  }
  const std::vector<Lerp> columns = lerps(in_width, out_width);
  const std::vector<Lerp> rows = lerps(in_height, out_height);
  const int64_t values = static_cast<int64_t>(out_height) * out_width;
  const int strips = static_cast<int>(std::clamp<int64_t>(
      values / kStripValues, 1, std::min<int64_t>(out_height, 4 * threads())));
  parallel_for(strips, [&](int strip) {
    const int begin = static_cast<int>(static_cast<int64_t>(out_height) * strip / strips);
    const int end = static_cast<int>(static_cast<int64_t>(out_height) * (strip + 1) / strips);
    // Widened input rows, kept while output rows still need them.
    std::vector<float> kept[2] = {std::vector<float>(out_width), std::vector<float>(out_width)};
    int held[2] = {-1, -1};
    const auto widened = [&](int y) {
      const int slot = y % 2;
      if (held[slot] != y) {
        widen_row(map + static_cast<size_t>(y) * in_width, columns, kept[slot].data());
        held[slot] = y;
      }
      return kept[slot].data();
    };
    for (int y = begin; y < end; ++y) {
      const float* first = widened(rows[y].first);
      const float* second = widened(rows[y].second);
      const float weight = rows[y].weight;
      float* to = out + static_cast<size_t>(y) * out_width;
      for (int x = 0; x < out_width; ++x) to[x] = lerp(first[x], second[x], weight);
    }
  });
}

}  // namespace fastad
