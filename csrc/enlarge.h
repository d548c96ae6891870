// An anomaly map at the size of the image.
#pragma once

#include <vector>

namespace fastad {

// An output value lies between two input values.
struct Lerp {
  int first, second;
  float weight;  // of the second
};

// Half-pixel centres, edges clamped, no antialiasing.
std::vector<Lerp> lerps(int in, int out);

inline float lerp(float first, float second, float weight) {
  return (1.0f - weight) * first + weight * second;
}

// Bilinear: along rows, then along columns. All arrays are contiguous. Equal sizes copy the bits.
void resize_map(const float* map, int in_height, int in_width, float* out, int out_height,
                int out_width);

}  // namespace fastad
