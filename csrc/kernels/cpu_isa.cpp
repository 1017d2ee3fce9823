#include <cstdlib>
#include <cstring>

#include "r2f/simd.h"

namespace r2f::simd {

static Isa detect() {
  Isa isa = Isa::kBaseline;
#ifdef R2F_X86_DISPATCH
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isa = Isa::kAvx2;
  if (isa == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    isa = Isa::kAvx512;
#endif
  const char* requested = std::getenv("R2F_CPU_ISA");
  if (requested != nullptr && std::strcmp(requested, "baseline") == 0) isa = Isa::kBaseline;
  if (requested != nullptr && std::strcmp(requested, "avx2") == 0 && isa == Isa::kAvx512) isa = Isa::kAvx2;
  return isa;
}

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace r2f::simd
