#include "regions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "enlarge.h"

namespace fastad {
namespace {

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

// Of each run the index of its region; sets how many there are.
std::vector<int32_t> number_runs(const std::vector<Run>& runs, int32_t& count) {
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
  std::vector<int32_t> number(runs.size());
  count = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    // A parent is never a later run, so its number is known.
    const auto up = static_cast<size_t>(parent[i]);
    number[i] = up == i ? count++ : number[up];
  }
  return number;
}

// The largest float that is not above the threshold: v > floor exactly when v > threshold.
float floor_of(double threshold) {
  const auto nearest = static_cast<float>(threshold);
  return nearest > threshold ? std::nextafter(nearest, -std::numeric_limits<float>::infinity())
                             : nearest;
}

struct Range {
  int begin, end;

  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

float peak_of(const float* begin, const float* end) {
  float peak = *begin;
  while (++begin < end) peak = std::max(peak, *begin);
  return peak;
}

double sum_of(const float* begin, const float* end) {
  double sums[4] = {};  // side by side, since each addition waits for the one before
  for (; end - begin >= 4; begin += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += begin[i];
  }
  for (; begin < end; ++begin) sums[0] += *begin;
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Hands out the values of the enlarged map wherever they may be above `floor`.
class Above {
 public:
  Above(const Enlarged& enlarged, float floor)
      : at_(enlarged),
        // A value lies between those of the map around it, up to the rounding of three products,
        // which next to zero is one of whole subnormal steps.
        limit_(floor - std::abs(floor) * 2e-6f - 4 * std::numeric_limits<float>::denorm_min()),
        is_same_(at_.in_height == at_.height && at_.in_width == at_.width),
        columns_(lerps(at_.in_width, at_.width)),
        rows_(lerps(at_.in_height, at_.height)),
        first_(at_.width),
        second_(at_.width),
        values_(at_.width),
        starts_(at_.in_width + 1, at_.width) {
    for (int x = at_.width - 1; x >= 0; --x) starts_[columns_[x].first] = x;
    for (int c = at_.in_width - 1; c >= 0; --c) starts_[c] = std::min(starts_[c], starts_[c + 1]);
  }

  // Calls with y, begin, end and the values of a row from 0 on, of which [begin, end) are set, from
  // left to right and from top to bottom.
  template <typename Call>
  void each(const Call& call) {
    for (int y = 0; y < at_.height;) {
      const int top = rows_[y].first;
      int end = y;
      while (end < at_.height && rows_[end].first == top) ++end;
      find_ranges(row(top), row(rows_[y].second));
      if (is_same_) {
        for (const Range& range : ranges_) call(y, range.begin, range.end, row(y));
      } else if (!ranges_.empty()) {
        each_between(row(top), row(rows_[y].second), y, end, call);
      }
      y = end;
    }
  }

 private:
  const float* row(int y) const { return at_.map + static_cast<size_t>(y) * at_.in_width; }

  bool is_hot(float value) const { return value > limit_; }

  // Columns of the image where one of the map's values around them is above the limit.
  void find_ranges(const float* top, const float* bottom) {
    ranges_.clear();
    int hot = 0;
    for (int c = 0; c < at_.in_width; ++c) hot |= is_hot(top[c]) | is_hot(bottom[c]);
    if (hot == 0) return;
    bool before = is_hot(top[0]) || is_hot(bottom[0]);
    for (int c = 0; c < at_.in_width; ++c) {
      const int next = std::min(c + 1, at_.in_width - 1);
      const bool after = is_hot(top[next]) || is_hot(bottom[next]);
      if ((before || after) && starts_[c] < starts_[c + 1]) {
        if (!ranges_.empty() && ranges_.back().end == starts_[c]) {
          ranges_.back().end = starts_[c + 1];
        } else {
          ranges_.push_back({starts_[c], starts_[c + 1]});
        }
      }
      before = after;
    }
  }

  // Rows [y, end), which lie between the same two rows of the map.
  template <typename Call>
  void each_between(const float* top, const float* bottom, int y, int end, const Call& call) {
    if (top == held_ && ranges_ == held_ranges_) {
      std::swap(first_, second_);
    } else {
      widen(top, first_);
    }
    widen(bottom, second_);
    held_ = bottom;
    held_ranges_ = ranges_;
    for (; y < end; ++y) {
      const float weight = rows_[y].weight;
      for (const Range& range : ranges_) {
        for (int x = range.begin; x < range.end; ++x) {
          values_[x] = lerp(first_[x], second_[x], weight);
        }
        call(y, range.begin, range.end, values_.data());
      }
    }
  }

  void widen(const float* row, std::vector<float>& to) const {
    for (const Range& range : ranges_) {
      for (int x = range.begin; x < range.end; ++x) {
        to[x] = lerp(row[columns_[x].first], row[columns_[x].second], columns_[x].weight);
      }
    }
  }

  const Enlarged& at_;
  const float limit_;
  const bool is_same_;
  const std::vector<Lerp> columns_, rows_;
  std::vector<float> first_, second_, values_;
  std::vector<int> starts_;  // first column of the image from each of the map on
  std::vector<Range> ranges_;
  const float* held_ = nullptr;  // the row that second_ was made from, over held_ranges_
  std::vector<Range> held_ranges_;
};

}  // namespace

void mask_above(const Enlarged& enlarged, double threshold, uint8_t* mask) {
  const float floor = floor_of(threshold);
  const auto width = static_cast<size_t>(enlarged.width);
  std::memset(mask, 0, width * enlarged.height);
  Above(enlarged, floor).each([&](int y, int begin, int end, const float* values) {
    uint8_t* to = mask + width * y;
    for (int x = begin; x < end; ++x) to[x] = values[x] > floor;
    if (enlarged.counted == nullptr) return;
    const uint8_t* counted = enlarged.counted + width * y;
    for (int x = begin; x < end; ++x) to[x] &= counted[x] != 0;
  });
}

Regions regions_above(const Enlarged& enlarged, double threshold) {
  const float floor = floor_of(threshold);
  std::vector<Run> runs;
  std::vector<float> peaks;
  std::vector<double> sums;
  Above(enlarged, floor).each([&](int y, int begin, int end, const float* values) {
    const uint8_t* counted = enlarged.counted == nullptr
                                 ? nullptr
                                 : enlarged.counted + static_cast<size_t>(enlarged.width) * y;
    const auto is_in = [&](int x) {
      return values[x] > floor && (counted == nullptr || counted[x] != 0);
    };
    for (int x = begin; x < end; ++x) {
      if (!is_in(x)) continue;
      const int first = x;
      while (x < end && is_in(x)) ++x;
      runs.push_back({y, first, x});
      peaks.push_back(peak_of(values + first, values + x));
      sums.push_back(sum_of(values + first, values + x));
    }
  });
  int32_t count = 0;
  const std::vector<int32_t> number = number_runs(runs, count);
  Regions regions;
  regions.boxes.resize(static_cast<size_t>(count) * 4);
  regions.areas.assign(count, 0);
  regions.peaks.resize(count);
  std::vector<double> totals(count, 0.0);
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    const auto k = static_cast<size_t>(number[i]);
    int32_t* box = &regions.boxes[k * 4];
    if (regions.areas[k] == 0) {
      const int32_t own[4] = {run.begin, run.y, run.end, run.y + 1};
      std::copy(own, own + 4, box);
      regions.peaks[k] = peaks[i];
    }
    box[0] = std::min(box[0], run.begin);
    box[2] = std::max(box[2], run.end);
    box[3] = run.y + 1;
    regions.areas[k] += run.end - run.begin;
    regions.peaks[k] = std::max(regions.peaks[k], peaks[i]);
    totals[k] += sums[i];
  }
  for (int32_t k = 0; k < count; ++k) {
    regions.means.push_back(static_cast<float>(totals[k] / static_cast<double>(regions.areas[k])));
  }
  return regions;
}

int connected_components(const uint8_t* mask, int height, int width, int32_t* labels) {
  const std::vector<Run> runs = find_runs(mask, height, width);
  int32_t count = 0;
  const std::vector<int32_t> number = number_runs(runs, count);
  std::fill_n(labels, static_cast<size_t>(height) * width, 0);
  for (size_t i = 0; i < runs.size(); ++i) {
    int32_t* row = labels + static_cast<size_t>(runs[i].y) * width;
    std::fill(row + runs[i].begin, row + runs[i].end, number[i] + 1);
  }
  return count;
}

}  // namespace fastad
