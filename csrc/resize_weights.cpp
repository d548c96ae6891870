// Arithmetic of Pillow's Resample.c (MIT-CMU): same expressions in the same order, hence same bits.
// https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c
#include "resize_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastad {
namespace {

constexpr size_t kCachedTables = 64;  // at most some tens of KiB each at camera sizes

struct Taps {
  std::vector<int32_t> first, count;
  std::vector<int32_t> weight;  // [out, most]
  int most;
};

double triangle(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

Taps pillow_taps(const Axis& axis) {
  const double scale = static_cast<double>(axis.end - axis.begin) / axis.out;
  const double filter_scale = std::max(scale, 1.0);
  const double support = filter_scale;
  Taps taps;
  taps.most = static_cast<int>(std::ceil(support)) * 2 + 1;
  taps.first.resize(axis.out);
  taps.count.resize(axis.out);
  taps.weight.assign(static_cast<size_t>(axis.out) * taps.most, 0);
  std::vector<double> real(taps.most);
  for (int i = 0; i < axis.out; ++i) {
    const double center = axis.begin + (i + 0.5) * scale;
    const double inverse = 1.0 / filter_scale;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int count = std::min(static_cast<int>(center + support + 0.5), axis.in) - first;
    double sum = 0.0;
    for (int j = 0; j < count; ++j) {
      real[j] = triangle((j + first - center + 0.5) * inverse);
      sum += real[j];
    }
    for (int j = 0; j < count; ++j) {
      if (sum != 0.0) real[j] /= sum;
      taps.weight[static_cast<size_t>(i) * taps.most + j] =
          static_cast<int32_t>(0.5 + real[j] * (1 << kPrecisionBits));
    }
    taps.first[i] = first;
    taps.count[i] = count;
  }
  return taps;
}

// Writes one tap's digits; `unit` is the distance between digits, in elements.
void put(uint8_t* to, int unit, Digits digits, int32_t weight) {
  if (digits == Digits::kWhole) {
    std::memcpy(to, &weight, 4);
  } else if (digits == Digits::kFifteen) {
    const int16_t low = static_cast<int16_t>(weight & 0x7fff);
    const int16_t high = static_cast<int16_t>(weight >> 15);
    std::memcpy(to, &low, 2);
    std::memcpy(to + 2 * unit, &high, 2);
  } else {
    for (int d = 0; d < 3; ++d) {
      const int8_t digit = static_cast<int8_t>(weight & 0xff);
      std::memcpy(to + d * unit, &digit, 1);
      weight = (weight - digit) >> 8;
    }
  }
}

Weights pack(const Taps& taps, Packing packing, Digits digits, int align) {
  const int element_bytes = digits == Digits::kWhole ? 4 : digits == Digits::kFifteen ? 2 : 1;
  const int digit_count = digits == Digits::kWhole ? 1 : digits == Digits::kFifteen ? 2 : 3;
  const int step_taps = packing.unit * packing.units;
  const int out = static_cast<int>(taps.first.size());
  Weights result;
  result.first.resize(out);
  result.last.resize(out);
  result.steps = 1;
  for (int i = 0; i < out; ++i) {
    result.first[i] = taps.first[i] / align * align;
    result.last[i] = taps.first[i] + taps.count[i] - 1;
    const int span = result.last[i] - result.first[i] + 1;
    result.steps = std::max(result.steps, (span + step_taps - 1) / step_taps);
  }
  result.taps = result.steps * step_taps;
  result.bytes_per_output = result.taps * digit_count * element_bytes;
  result.packed.assign(static_cast<size_t>(out) * result.bytes_per_output, 0);
  const int unit_bytes = packing.unit * digit_count * element_bytes;
  for (int i = 0; i < out; ++i) {
    uint8_t* row = result.packed.data() + static_cast<size_t>(i) * result.bytes_per_output;
    for (int j = 0; j < taps.count[i]; ++j) {
      const int tap = taps.first[i] - result.first[i] + j;
      uint8_t* to = row + tap / packing.unit * unit_bytes + tap % packing.unit * element_bytes;
      put(to, packing.unit, digits, taps.weight[static_cast<size_t>(i) * taps.most + j]);
    }
  }
  return result;
}

struct Entry {
  Axis axis;
  Packing packing;
  Digits digits;
  int align;
  std::shared_ptr<const Weights> weights;
};

struct Cache {
  std::mutex mutex;
  std::list<Entry> entries;  // most recently used first
};

Cache* make_cache();
Cache* g_cache = make_cache();

Cache* make_cache() {
#if defined(__unix__) || defined(__APPLE__)
  // The parent may have forked while another thread held the mutex.
  pthread_atfork(nullptr, nullptr, [] { g_cache = new Cache; });
#endif
  return new Cache;
}

}  // namespace

bool Axis::is_crop() const {
  return begin == std::floor(begin) && end - begin == static_cast<float>(out);
}

bool Axis::operator==(const Axis& other) const {
  return in == other.in && begin == other.begin && end == other.end && out == other.out;
}

std::shared_ptr<const Weights> weights_for(const Axis& axis, Packing packing, Digits digits,
                                           int align) {
  Cache& cache = *g_cache;
  {
    const std::lock_guard<std::mutex> lock(cache.mutex);
    for (auto entry = cache.entries.begin(); entry != cache.entries.end(); ++entry) {
      if (entry->axis == axis && entry->packing.unit == packing.unit &&
          entry->packing.units == packing.units && entry->digits == digits &&
          entry->align == align) {
        cache.entries.splice(cache.entries.begin(), cache.entries, entry);
        return entry->weights;
      }
    }
  }
  auto weights = std::make_shared<const Weights>(pack(pillow_taps(axis), packing, digits, align));
  const std::lock_guard<std::mutex> lock(cache.mutex);
  cache.entries.push_front({axis, packing, digits, align, weights});
  if (cache.entries.size() > kCachedTables) cache.entries.pop_back();
  return weights;
}

}  // namespace fastad
