// The inner loops of the resize, once per instruction set.
//
// The horizontal pass works on `lanes` image rows side by side and writes them interleaved: byte
// (position * lanes + row) of a block, position = column * channels + channel. The vertical pass
// then finds `lanes` taps of one position in consecutive bytes and needs no shuffles.
//
// Weights are Pillow's: integers of 22 fractional bits, at most 2^22, summed in 32 bits. SIMD
// multiplies 8 or 16 bits wide, so a weight is split into digits whose products are summed apart
// and shifted together at the end. All of that is exact modulo 2^32, and the sum fits 31 bits.
//
// Files that include this header are compiled for one instruction set: no inline code of the
// standard library here, the linker could pick its AVX copy for every CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastad {

constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr int kRound = 1 << (kPrecisionBits - 1);
constexpr int kBlockPadding = 128;  // bytes the kernels may read or write past a block's end
constexpr int kRowPadding = 32;     // bytes they may read past the last tap of an image row

// How the weights of one output are laid out: steps of units * unit taps; within a unit the
// first digits of its taps, then their second digits, and so on.
struct Packing {
  int unit;
  int units;
};

enum class Digits {
  kWhole,     // one int32
  kFifteen,   // int16: low 15 bits, then the rest
  kBalanced,  // three int8 in -128..127, base 256, lowest first
};

struct HorizontalPass {
  const int32_t* first;   // [out_width] first column read
  const uint8_t* weights; // [out_width, steps] packed
  int steps;
  int out_width;
  int channels;           // of the image: 1, 3 or 4; a block has 1 or 3
  bool swap_red_blue;
  ptrdiff_t ahead;        // bytes from a row to the one in its place in the next call
};

// Rows lie further apart than the hardware looks ahead: the next call's are fetched meanwhile.
static inline void prefetch(const uint8_t* const* rows, int count, ptrdiff_t offset) {
  for (int i = 0; i < count; ++i) __builtin_prefetch(rows[i] + offset, 0, 2);
}

struct Kernels {
  const char* name;
  int lanes;          // image rows interleaved in a block
  int group;          // blocks written by one call of the horizontal pass
  Digits digits;
  Packing color;      // horizontal, 3 or 4 channels
  Packing gray;       // horizontal, 1 channel

  // rows: group * lanes image rows; blocks: group blocks, block_bytes apart.
  void (*horizontal)(const HorizontalPass& pass, const uint8_t* const* rows, uint8_t* blocks,
                     ptrdiff_t block_bytes);

  // Weights of one output row over `steps` blocks, packed in units of `lanes`, one a step.
  // Writes exactly `positions` bytes.
  void (*vertical)(const uint8_t* const* blocks, int steps, const uint8_t* weights, int positions,
                   uint8_t* out);
};

extern const Kernels kScalarKernels;
#ifdef FASTAD_X86
extern const Kernels kAvx2Kernels;    // AVX2
extern const Kernels kAvx512Kernels;  // AVX-512 F, BW, VL, VNNI
#endif

}  // namespace fastad
