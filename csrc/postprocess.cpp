#include "postprocess.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "parallel.h"

namespace fastad {
namespace {

constexpr int64_t kStripValues = 1 << 16;  // of the output: 256 KiB, worth waking a thread

struct Lerp {
  int first, second;
  float weight;  // of the second
};

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

void widen_row(const float* row, const std::vector<Lerp>& columns, float* out) {
  for (size_t x = 0; x < columns.size(); ++x) {
    const Lerp& lerp = columns[x];
    out[x] = (1.0f - lerp.weight) * row[lerp.first] + lerp.weight * row[lerp.second];
  }
}

// Provisional regions are runs of pixels within a row; a region's root is its first run.
struct Run {
  int32_t y, begin, end;
};

int32_t find_root(std::vector<int32_t>& parent, int32_t run) {
  while (parent[run] != run) run = parent[run] = parent[parent[run]];
  return run;
}

void join(std::vector<int32_t>& parent, int32_t a, int32_t b) {
  a = find_root(parent, a);
  b = find_root(parent, b);
  parent[std::max(a, b)] = std::min(a, b);
}

int next_set(const uint8_t* row, int x, int width) {
  // Most of a mask is background: skip eight pixels at a time.
  for (uint64_t word; x + 8 <= width; x += 8) {
    std::memcpy(&word, row + x, 8);
    if (word != 0) break;
  }
  while (x < width && row[x] == 0) ++x;
  return x;
}

std::vector<Run> find_runs(const uint8_t* mask, int height, int width) {
  std::vector<Run> runs;
  for (int y = 0; y < height; ++y) {
    const uint8_t* row = mask + static_cast<size_t>(y) * width;
    for (int x = next_set(row, 0, width); x < width; x = next_set(row, x, width)) {
      const int begin = x;
      while (x < width && row[x] != 0) ++x;
      runs.push_back({y, begin, x});
    }
  }
  return runs;
}

std::vector<int32_t> join_runs(const std::vector<Run>& runs) {
  std::vector<int32_t> parent(runs.size());
  std::iota(parent.begin(), parent.end(), 0);
  size_t above = 0;  // first run that may touch the current one
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    // Pixels touch across a corner too: hence < here and <= below.
    while (runs[above].y < run.y - 1 || (runs[above].y == run.y - 1 && runs[above].end < run.begin))
      ++above;
    for (size_t j = above; runs[j].y == run.y - 1 && runs[j].begin <= run.end; ++j) {
      join(parent, static_cast<int32_t>(i), static_cast<int32_t>(j));
    }
  }
  return parent;
}

}  // namespace

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
      for (int x = 0; x < out_width; ++x) {
        to[x] = (1.0f - weight) * first[x] + weight * second[x];
      }
    }
  });
}

void threshold_mask(const float* map, size_t count, double threshold, uint8_t* mask) {
  // The largest float that is not above the threshold: v > floor exactly when v > threshold.
  float floor = static_cast<float>(threshold);
  if (floor > threshold) floor = std::nextafter(floor, -std::numeric_limits<float>::infinity());
  for (size_t i = 0; i < count; ++i) mask[i] = map[i] > floor;
}

int connected_components(const uint8_t* mask, int height, int width, int32_t* labels) {
  const std::vector<Run> runs = find_runs(mask, height, width);
  const std::vector<int32_t> parent = join_runs(runs);
  std::fill_n(labels, static_cast<size_t>(height) * width, 0);
  std::vector<int32_t> number(runs.size());
  int count = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    // A parent is never a later run, so its number is known.
    const auto up = static_cast<size_t>(parent[i]);
    number[i] = up == i ? ++count : number[up];
    std::fill(labels + static_cast<size_t>(runs[i].y) * width + runs[i].begin,
              labels + static_cast<size_t>(runs[i].y) * width + runs[i].end, number[i]);
  }
  return count;
}

bool region_stats(const int32_t* labels, const float* map, int height, int width, int count,
                  Regions& regions) {
  regions.boxes.resize(static_cast<size_t>(count) * 4);
  regions.areas.assign(count, 0);
  regions.peaks.assign(count, -std::numeric_limits<float>::infinity());
  regions.means.assign(count, 0.0f);
  std::vector<double> sums(count, 0.0);
  for (int i = 0; i < count; ++i) {
    const int32_t empty[4] = {width, height, 0, 0};
    std::copy(empty, empty + 4, &regions.boxes[static_cast<size_t>(i) * 4]);
  }
  for (int y = 0; y < height; ++y) {
    const size_t begin = static_cast<size_t>(y) * width;
    for (int x = 0; x < width; ++x) {
      const int32_t label = labels[begin + x];
      if (label == 0) continue;
      if (label < 0 || label > count) return false;
      const size_t i = label - 1;
      int32_t* box = &regions.boxes[i * 4];
      box[0] = std::min(box[0], x);
      box[1] = std::min(box[1], y);
      box[2] = std::max(box[2], x + 1);
      box[3] = y + 1;
      const float value = map[begin + x];
      regions.areas[i] += 1;
      if (value > regions.peaks[i]) regions.peaks[i] = value;
      sums[i] += value;
    }
  }
  for (int i = 0; i < count; ++i) {
    if (regions.areas[i] == 0) {
      std::fill_n(&regions.boxes[static_cast<size_t>(i) * 4], 4, 0);
      regions.peaks[i] = std::numeric_limits<float>::quiet_NaN();
    }
    regions.means[i] = static_cast<float>(sums[i] / static_cast<double>(regions.areas[i]));
  }
  return true;
}

}  // namespace fastad
