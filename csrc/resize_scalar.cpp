#include <cstring>

#include "resize_kernels.h"

namespace fastad {
namespace {

constexpr int kChunk = 64;  // positions summed together; the block's padding covers the last chunk

uint8_t clip8(int32_t sum) {
  const int32_t value = sum >> kPrecisionBits;
  return static_cast<uint8_t>(value > 255 ? 255 : value);  // weights are never negative
}

template <int kChannels>
void horizontal_row(const HorizontalPass& pass, const uint8_t* row, uint8_t* block) {
  constexpr int kOut = kChannels == 1 ? 1 : 3;
  const int red = pass.swap_red_blue ? 2 : 0;
  const auto* weights = reinterpret_cast<const int32_t*>(pass.weights);
  for (int x = 0; x < pass.out_width; ++x, weights += pass.steps, block += kOut) {
    const uint8_t* pixel = row + static_cast<ptrdiff_t>(pass.first[x]) * kChannels;
    int32_t sum[kOut];
    for (int c = 0; c < kOut; ++c) sum[c] = kRound;
    for (int s = 0; s < pass.steps; ++s, pixel += kChannels) {
      for (int c = 0; c < kOut; ++c) sum[c] += pixel[c] * weights[s];
    }
    if constexpr (kOut == 1) {
      block[0] = clip8(sum[0]);
    } else {
      block[0] = clip8(sum[red]);
      block[1] = clip8(sum[1]);
      block[2] = clip8(sum[2 - red]);
    }
  }
}

void horizontal(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                ptrdiff_t /*block_bytes*/) {
  if (pass.channels == 1) return horizontal_row<1>(pass, rows[0], blocks);
  if (pass.channels == 3) return horizontal_row<3>(pass, rows[0], blocks);
  horizontal_row<4>(pass, rows[0], blocks);
}

void vertical(const uint8_t* const* blocks, int steps, const uint8_t* weights, int positions,
              uint8_t* out) {
  const auto* weight = reinterpret_cast<const int32_t*>(weights);
  for (int begin = 0; begin < positions; begin += kChunk) {
    int32_t sum[kChunk];
    for (int i = 0; i < kChunk; ++i) sum[i] = kRound;
    for (int s = 0; s < steps; ++s) {
      const uint8_t* row = blocks[s] + begin;
      for (int i = 0; i < kChunk; ++i) sum[i] += row[i] * weight[s];
    }
    const int count = positions - begin < kChunk ? positions - begin : kChunk;
    for (int i = 0; i < count; ++i) out[begin + i] = clip8(sum[i]);
  }
}

}  // namespace

const Kernels kScalarKernels = {"scalar", 1,      1,          Digits::kWhole,
                                {1, 1},   {1, 1}, horizontal, vertical};

}  // namespace fastad
