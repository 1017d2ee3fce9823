// Fixed-size vectors for CPU kernels, on the vector extensions that GCC and Clang share, and the run-time choice of
// instruction set.
//
// A kernel is written once, as templates over the vector's size in bytes, every function marked R2F_INLINE. For each
// instruction set one entry function carries a target attribute and the templates are inlined into it, so the whole
// package needs no -march flag and runs on any machine. On other processors than x86-64 the 16-byte baseline is all
// there is (NEON, say).
#pragma once

#include <cstdint>
#include <cstring>

#include "r2f/dtype.h"

#define R2F_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define R2F_X86_DISPATCH 1
#define R2F_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define R2F_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

// GCC warns that vectors wider than the baseline's registers are passed differently per target; here nothing is passed,
// all is inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace r2f::simd {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest instruction set of this processor; R2F_CPU_ISA=baseline|avx2 lowers it (for tests and comparisons).
Isa best_isa();

template <typename Acc, int Bytes>
struct VectorOf {
  typedef Acc type __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / static_cast<int>(sizeof(Acc));
};

template <typename V, typename Acc>
R2F_INLINE V load(const Acc* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));  // an unaligned load
  return v;
}

template <typename V, typename Acc>
R2F_INLINE void store(Acc* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// Sums the lanes by halves.
template <typename Acc, int Bytes>
R2F_INLINE Acc sum_lanes(const typename VectorOf<Acc, Bytes>::type& v) {
  if constexpr (Bytes == static_cast<int>(2 * sizeof(Acc))) {
    return v[0] + v[1];
  } else {
    using Half = typename VectorOf<Acc, Bytes / 2>::type;
    Half low, high;
    std::memcpy(&low, &v, Bytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + Bytes / 2, Bytes / 2);
    const Half sum = low + high;
    return sum_lanes<Acc, Bytes / 2>(sum);
  }
}

}  // namespace r2f::simd
