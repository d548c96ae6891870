#include "cpu.h"

#ifdef FASTAD_X86
#include <cpuid.h>
#endif

namespace fastad {

bool sums_int8_exactly() {
#ifdef FASTAD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni")) return true;
  // AVX-VNNI, which not every compiler's builtin knows: leaf 7, subleaf 1, EAX bit 4.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
         (eax >> 4 & 1) != 0;
#else
  return true;
#endif
}

}  // namespace fastad
