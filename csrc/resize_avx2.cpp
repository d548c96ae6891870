// AVX2: one instruction multiplies 2 pixels, widened to 16 bits, by 2 digits and sums them.
#include <immintrin.h>

#include "resize_kernels.h"

namespace fastad {
namespace {

constexpr int kLanes = 2;  // one image row per 128-bit lane

struct Sums {
  __m256i low, high;
};

inline Sums start() { return {_mm256_set1_epi32(kRound), _mm256_setzero_si256()}; }

inline void add(Sums& sums, __m256i pixels, __m256i low, __m256i high) {
  sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(pixels, low));
  sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(pixels, high));
}

inline __m256i total(const Sums& sums) {
  return _mm256_add_epi32(sums.low, _mm256_slli_epi32(sums.high, 15));
}

inline __m256i load_rows(const uint8_t* const* rows, ptrdiff_t offset) {
  const auto row = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset));
  };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
}

inline __m256i pair(const uint8_t* weights, int index) {
  int32_t word;
  __builtin_memcpy(&word, weights + 4 * index, 4);
  return _mm256_set1_epi32(word);
}

// Per lane: word 2 * channel + tap of the result from a pixel run of 2 taps.
inline __m256i color_pattern(int channels, bool swap_red_blue, int first_tap) {
  alignas(16) uint8_t index[16];
  for (int i = 0; i < 8; ++i) {
    const int c = i / 2;
    const int from = (first_tap + i % 2) * channels + (swap_red_blue ? 2 - c : c);
    index[2 * i] = c == 3 ? 0x80 : static_cast<uint8_t>(from);
    index[2 * i + 1] = 0x80;
  }
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(index)));
}

// Two rows of [R G B -] sums to the bytes R0 R1 G0 G1 B0 B1 - -.
inline __m128i interleaved(const Sums& sums) {
  const __m256i sum = _mm256_srli_epi32(total(sums), kPrecisionBits);
  const __m256i words = _mm256_packus_epi32(sum, sum);
  const __m256i packed = _mm256_packus_epi16(words, words);
  return _mm_unpacklo_epi8(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
}

void horizontal_color(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                      ptrdiff_t block_bytes) {
  const __m256i pattern0 = color_pattern(pass.channels, pass.swap_red_blue, 0);
  const __m256i pattern2 = color_pattern(pass.channels, pass.swap_red_blue, 2);
  const uint8_t* weights = pass.weights;
  for (int x = 0; x < pass.out_width; ++x) {
    ptrdiff_t offset = static_cast<ptrdiff_t>(pass.first[x]) * pass.channels;
    prefetch(rows, 2 * kLanes, offset + pass.ahead);
    Sums sums0 = start();
    Sums sums1 = start();
    for (int s = 0; s < pass.steps; ++s, offset += 4 * pass.channels, weights += 16) {
      const __m256i pixels0 = load_rows(rows, offset);
      const __m256i pixels1 = load_rows(rows + kLanes, offset);
      __m256i low = pair(weights, 0);
      __m256i high = pair(weights, 1);
      add(sums0, _mm256_shuffle_epi8(pixels0, pattern0), low, high);
      add(sums1, _mm256_shuffle_epi8(pixels1, pattern0), low, high);
      low = pair(weights, 2);
      high = pair(weights, 3);
      add(sums0, _mm256_shuffle_epi8(pixels0, pattern2), low, high);
      add(sums1, _mm256_shuffle_epi8(pixels1, pattern2), low, high);
    }
    uint8_t* to = blocks + static_cast<ptrdiff_t>(x) * 3 * kLanes;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), interleaved(sums0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + block_bytes), interleaved(sums1));
  }
}

inline __m256i widen(const uint8_t* pixels) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels)));
}

void horizontal_gray(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                     ptrdiff_t block_bytes) {
  const uint8_t* weights = pass.weights;
  for (int x = 0; x < pass.out_width; ++x) {
    ptrdiff_t offset = pass.first[x];
    if (x % 4 == 0) prefetch(rows, 2 * kLanes, offset + pass.ahead);
    Sums sums[4];
    for (Sums& sum : sums) sum = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int s = 0; s < pass.steps; ++s, offset += 16, weights += 64) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32));
      for (int r = 0; r < 4; ++r) add(sums[r], widen(rows[r] + offset), low, high);
    }
    // Eight partial sums of each of four rows down to one word a row.
    const __m256i rows01 = _mm256_hadd_epi32(total(sums[0]), total(sums[1]));
    const __m256i rows23 = _mm256_hadd_epi32(total(sums[2]), total(sums[3]));
    const __m256i halves = _mm256_hadd_epi32(rows01, rows23);
    __m128i sum =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    sum = _mm_srli_epi32(_mm_add_epi32(sum, _mm_set1_epi32(kRound)), kPrecisionBits);
    sum = _mm_packus_epi32(sum, sum);
    const int32_t word = _mm_cvtsi128_si32(_mm_packus_epi16(sum, sum));
    uint8_t* to = blocks + static_cast<ptrdiff_t>(x) * kLanes;
    __builtin_memcpy(to, &word, 2);
    __builtin_memcpy(to + block_bytes, reinterpret_cast<const uint8_t*>(&word) + 2, 2);
  }
}

void horizontal(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                ptrdiff_t block_bytes) {
  (pass.channels == 1 ? horizontal_gray : horizontal_color)(pass, rows, blocks, block_bytes);
}

void vertical(const uint8_t* const* blocks, int steps, const uint8_t* weights, int positions,
              uint8_t* out) {
  for (int i = 0; i < positions; i += 16) {
    Sums sums0 = start();
    Sums sums1 = start();
    for (int s = 0; s < steps; ++s) {
      const uint8_t* block = blocks[s] + static_cast<ptrdiff_t>(i) * kLanes;
      const __m256i low = pair(weights + 8 * s, 0);
      const __m256i high = pair(weights + 8 * s, 1);
      add(sums0, widen(block), low, high);
      add(sums1, widen(block + 16), low, high);
    }
    const __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(total(sums0), kPrecisionBits),
                                              _mm256_srli_epi32(total(sums1), kPrecisionBits));
    const __m256i ordered = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i result = _mm_packus_epi16(_mm256_castsi256_si128(ordered),
                                            _mm256_extracti128_si256(ordered, 1));
    if (positions - i >= 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), result);
    } else {
      alignas(16) uint8_t tail[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(tail), result);
      __builtin_memcpy(out + i, tail, positions - i);
    }
  }
}

}  // namespace

const Kernels kAvx2Kernels = {"avx2", kLanes,  2,          Digits::kFifteen,
                              {2, 2}, {16, 1}, horizontal, vertical};

}  // namespace fastad
