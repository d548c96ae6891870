// What this CPU can do that a caller has to know.
#pragma once

namespace fastad {

// Whether kernels for int8 sum products exactly. Without dot-product instructions (AVX512-VNNI,
// AVX-VNNI) those for x86 add pairs of products in 16 bits, which saturates: 255 * 127 * 2 does not
// fit.
bool sums_int8_exactly();

}  // namespace fastad
