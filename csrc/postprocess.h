// From a small anomaly map to the image: resize, threshold, regions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastad {

// Bilinear with half-pixel centres, edges clamped, no antialiasing. All arrays are contiguous.
// Equal sizes copy the bits.
void resize_map(const float* map, int in_height, int in_width, float* out, int out_height,
                int out_width);

// 1 where the map is above the threshold, compared as real numbers; NaN is never above.
void threshold_mask(const float* map, size_t count, double threshold, uint8_t* mask);

// Numbers the 8-connected regions of nonzero mask values 1, 2, .. in raster order of their first
// pixel; 0 is background. Returns how many there are.
int connected_components(const uint8_t* mask, int height, int width, int32_t* labels);

struct Regions {
  std::vector<int32_t> boxes;  // [count, 4] x0 y0 x1 y1, ends exclusive; zeros if it has no pixel
  std::vector<int64_t> areas;  // [count] pixels
  std::vector<float> peaks;    // [count] largest value, NaN passed over
  std::vector<float> means;    // [count]
};

// Returns false, with unspecified results, if a label is negative or above count.
bool region_stats(const int32_t* labels, const float* map, int height, int width, int count,
                  Regions& regions);

}  // namespace fastad
