// Antialiased bilinear resize of uint8 images, bit for bit Pillow's.
//
// Equals Image.resize(size, BILINEAR, box=box) of modes L, RGB and, channel by channel, RGBX/CMYK:
// the horizontal pass, rounded to 8 bits, then the vertical one, in that order for every shape.
// Pillow up to 12 does the same. Since 13 it runs the vertical pass first where the height shrinks
// by more than twice as many pixels as the width, which moves about a fifth of the values by one;
// here results stay what they were, whichever Pillow is installed.
// https://github.com/python-pillow/Pillow/pull/9549
//
// Pillow's RGBA differs: it multiplies colour by alpha first. Here a fourth channel is dropped
// and has no influence.
#pragma once

#include <string>
#include <vector>

#include "array.h"

namespace fastad {

struct ResizeItem {
  ImageView image;
  Box box;       // 0 <= x0 <= x1 <= width, likewise y
  uint8_t* out;  // [height, width, 3] contiguous; one channel in is written three times
};

// Resizes every item to (height, width), in parallel over items and strips of their rows.
void resize(const std::vector<ResizeItem>& items, int height, int width, bool swap_red_blue);

// Instruction sets this machine can use, best last; the best is in use from the start.
std::vector<std::string> simd_levels();
std::string simd_level();
// For tests and measurements. Returns false if the machine has no such level.
bool set_simd_level(const std::string& name);

}  // namespace fastad
