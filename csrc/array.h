// Plain views of the caller's memory: pointers and sizes, checked in Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastad {

// uint8 pixels, contiguous within a row; rows lie row_stride bytes apart, in either direction.
struct ImageView {
  const uint8_t* data;
  ptrdiff_t row_stride;
  int height;
  int width;
  int channels;  // 1, 3 or 4
};

// Part of an image in pixels, edges rather than centres: the whole image is (0, 0, width, height).
struct Box {
  float x0, y0, x1, y1;
};

}  // namespace fastad
