// What of an anomaly map is above a threshold, at the size of the image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastad {

// A map that is looked at in the size of the image, as `resize_map` makes it, to the bit; only what
// may be above the threshold is computed. `counted` is [height, width], or null where all counts.
struct Enlarged {
  const float* map;
  int in_height, in_width;
  int height, width;
  const uint8_t* counted;
};

// 1 where a counting value is above the threshold, compared as real numbers; NaN is never above.
void mask_above(const Enlarged& enlarged, double threshold, uint8_t* mask);

struct Regions {
  std::vector<int32_t> boxes;  // [count, 4] x0 y0 x1 y1, ends exclusive
  std::vector<int64_t> areas;  // [count] pixels
  std::vector<float> peaks;    // [count] largest value
  std::vector<float> means;    // [count]
};

// The 8-connected regions of `mask_above`, in raster order of their first pixel.
Regions regions_above(const Enlarged& enlarged, double threshold);

// Numbers the 8-connected regions of nonzero mask values 1, 2, .. in raster order of their first
// pixel; 0 is background. Returns how many there are.
int connected_components(const uint8_t* mask, int height, int width, int32_t* labels);

}  // namespace fastad
