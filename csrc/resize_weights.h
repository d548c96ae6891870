// Pillow's resampling weights for one axis, packed for a set of kernels and cached.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "resize_kernels.h"

namespace fastad {

// One axis of a resize: `in` pixels, of which [begin, end) become `out` pixels.
struct Axis {
  int in;
  float begin, end;
  int out;

  // The output is a run of whole input pixels: a copy.
  bool is_crop() const;
  bool operator==(const Axis& other) const;
};

struct Weights {
  std::vector<int32_t> first;   // [out] first input pixel read, a multiple of `align`
  std::vector<int32_t> last;    // [out] last input pixel with a weight
  std::vector<uint8_t> packed;  // [out, bytes_per_output]
  int steps;
  int taps;  // read per output, padding included
  int bytes_per_output;
};

// Reads start at a multiple of `align`; taps that only pad have weight 0 and may lie past `in`.
std::shared_ptr<const Weights> weights_for(const Axis& axis, Packing packing, Digits digits,
                                           int align);

}  // namespace fastad
