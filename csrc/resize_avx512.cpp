// AVX-512 with VNNI: one instruction multiplies 4 unsigned bytes by 4 signed digits and sums them.
#include <immintrin.h>

#include "resize_kernels.h"

namespace fastad {
namespace {

constexpr int kLanes = 4;  // one image row per 128-bit lane
constexpr int kMostUnrolled = 8;  // steps

struct Sums {
  __m512i digit[3];
};

inline Sums start() {
  return {{_mm512_set1_epi32(kRound), _mm512_setzero_si512(), _mm512_setzero_si512()}};
}

inline __m512i load_rows(const uint8_t* const* rows, ptrdiff_t offset) {
  const auto row = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset));
  };
  __m512i v = _mm512_castsi128_si512(row(0));
  v = _mm512_inserti32x4(v, row(1), 1);
  v = _mm512_inserti32x4(v, row(2), 2);
  return _mm512_inserti32x4(v, row(3), 3);
}

inline __m512i total(const Sums& sums) {
  const __m512i high = _mm512_slli_epi32(sums.digit[2], 16);
  const __m512i middle = _mm512_slli_epi32(sums.digit[1], 8);
  return _mm512_add_epi32(sums.digit[0], _mm512_add_epi32(middle, high));
}

inline __m128i bytes(__m512i sum) {
  return _mm512_cvtusepi32_epi8(_mm512_srli_epi32(sum, kPrecisionBits));
}

inline __m512i digit4(const uint8_t* weights, int digit) {
  int32_t word;
  __builtin_memcpy(&word, weights + 4 * digit, 4);
  return _mm512_set1_epi32(word);
}

// Per lane: byte 4 * channel + tap of the result from a pixel run of 4 taps.
inline __m512i color_pattern(int channels, bool swap_red_blue) {
  alignas(16) uint8_t index[16];
  for (int i = 0; i < 16; ++i) {
    const int c = i / 4;
    index[i] = c == 3 ? 0x80 : static_cast<uint8_t>(i % 4 * channels + (swap_red_blue ? 2 - c : c));
  }
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(index)));
}

// kSteps of 0 stands for any number. Unrolled, the sums are not copied about between the steps.
template <int kChannels, int kSteps>
void horizontal_color(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                      ptrdiff_t block_bytes) {
  const __m512i pattern = color_pattern(kChannels, pass.swap_red_blue);
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int steps = kSteps == 0 ? pass.steps : kSteps;
  const uint8_t* weights = pass.weights;
  for (int x = 0; x < pass.out_width; ++x, weights += 12 * steps) {
    const ptrdiff_t offset = static_cast<ptrdiff_t>(pass.first[x]) * kChannels;
    prefetch(rows, 2 * kLanes, offset + pass.ahead);
    Sums sums0 = start();
    Sums sums1 = start();
#pragma GCC unroll kMostUnrolled
    for (int s = 0; s < steps; ++s) {
      const ptrdiff_t run = offset + 4 * kChannels * s;
      const __m512i pixels0 = _mm512_shuffle_epi8(load_rows(rows, run), pattern);
      const __m512i pixels1 = _mm512_shuffle_epi8(load_rows(rows + kLanes, run), pattern);
      for (int d = 0; d < 3; ++d) {
        const __m512i weight = digit4(weights + 12 * s, d);
        sums0.digit[d] = _mm512_dpbusd_epi32(sums0.digit[d], pixels0, weight);
        sums1.digit[d] = _mm512_dpbusd_epi32(sums1.digit[d], pixels1, weight);
      }
    }
    auto* to = reinterpret_cast<__m128i*>(blocks + static_cast<ptrdiff_t>(x) * 3 * kLanes);
    auto* to1 = reinterpret_cast<__m128i*>(reinterpret_cast<uint8_t*>(to) + block_bytes);
    _mm_storeu_si128(to, _mm_shuffle_epi8(bytes(total(sums0)), transpose));
    _mm_storeu_si128(to1, _mm_shuffle_epi8(bytes(total(sums1)), transpose));
  }
}

inline int32_t gray4(const Sums& sums) {
  __m512i sum = total(sums);  // kRound sits in all four words of a lane: three too many
  sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
  sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));
  sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(3 * kRound));
  const __m128i packed = bytes(sum);
  const __m128i first = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  return _mm_cvtsi128_si32(_mm_shuffle_epi8(packed, first));
}

void horizontal_gray(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                     ptrdiff_t block_bytes) {
  const uint8_t* weights = pass.weights;
  for (int x = 0; x < pass.out_width; ++x) {
    ptrdiff_t offset = pass.first[x];
    if (x % 4 == 0) prefetch(rows, 2 * kLanes, offset + pass.ahead);
    Sums sums0 = start();
    Sums sums1 = start();
    for (int s = 0; s < pass.steps; ++s, offset += 16, weights += 48) {
      const __m512i pixels0 = load_rows(rows, offset);
      const __m512i pixels1 = load_rows(rows + kLanes, offset);
      for (int d = 0; d < 3; ++d) {
        const __m512i weight = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 16 * d)));
        sums0.digit[d] = _mm512_dpbusd_epi32(sums0.digit[d], pixels0, weight);
        sums1.digit[d] = _mm512_dpbusd_epi32(sums1.digit[d], pixels1, weight);
      }
    }
    const int32_t word0 = gray4(sums0);
    const int32_t word1 = gray4(sums1);
    uint8_t* to = blocks + static_cast<ptrdiff_t>(x) * kLanes;
    __builtin_memcpy(to, &word0, 4);
    __builtin_memcpy(to + block_bytes, &word1, 4);
  }
}

template <int kChannels>
void horizontal_color(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                      ptrdiff_t block_bytes) {
  static constexpr decltype(&horizontal_color<3, 0>) kBySteps[kMostUnrolled + 1] = {
      horizontal_color<kChannels, 0>, horizontal_color<kChannels, 1>,
      horizontal_color<kChannels, 2>, horizontal_color<kChannels, 3>,
      horizontal_color<kChannels, 4>, horizontal_color<kChannels, 5>,
      horizontal_color<kChannels, 6>, horizontal_color<kChannels, 7>,
      horizontal_color<kChannels, 8>};
  const int known = pass.steps <= kMostUnrolled ? pass.steps : 0;
  kBySteps[known](pass, rows, blocks, block_bytes);
}

void horizontal(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                ptrdiff_t block_bytes) {
  const auto pass_of = pass.channels == 1   ? horizontal_gray
                       : pass.channels == 3 ? horizontal_color<3>
                                            : horizontal_color<4>;
  pass_of(pass, rows, blocks, block_bytes);
}

void vertical(const uint8_t* const* blocks, int steps, const uint8_t* weights, int positions,
              uint8_t* out) {
  for (int i = 0; i < positions; i += 32) {
    Sums sums0 = start();
    Sums sums1 = start();
    for (int s = 0; s < steps; ++s) {
      const uint8_t* block = blocks[s] + static_cast<ptrdiff_t>(i) * kLanes;
      const __m512i pixels0 = _mm512_loadu_si512(block);
      const __m512i pixels1 = _mm512_loadu_si512(block + 64);
      for (int d = 0; d < 3; ++d) {
        const __m512i weight = digit4(weights + 12 * s, d);
        sums0.digit[d] = _mm512_dpbusd_epi32(sums0.digit[d], pixels0, weight);
        sums1.digit[d] = _mm512_dpbusd_epi32(sums1.digit[d], pixels1, weight);
      }
    }
    const __m256i result = _mm256_set_m128i(bytes(total(sums1)), bytes(total(sums0)));
    const int left = positions - i;
    const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
    _mm256_mask_storeu_epi8(out + i, mask, result);
  }
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512", kLanes,  2,          Digits::kBalanced,
                                {4, 1},   {16, 1}, horizontal, vertical};

}  // namespace fastad
