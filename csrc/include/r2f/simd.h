// Fixed-size vectors for CPU kernels, on the vector extensions that GCC and Clang share, and the choice of instruction
// set at run time.
//
// A kernel is written once, as function templates over the vector's size in bytes, every function marked R2F_INLINE.
// dispatch_isa() instantiates it for each instruction set inside a function with the matching target attribute, so the
// package needs no -march flag and runs on any x86-64 processor. On other architectures only the 16-byte baseline is
// compiled (for example NEON).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "r2f/dtype.h"

#define R2F_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define R2F_X86_DISPATCH 1
#define R2F_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define R2F_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

// GCC warns that the calling convention for wide vectors depends on the target; here every call is inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace r2f::simd {

enum class Isa { kBaseline, kAvx2, kAvx512 };

#ifdef R2F_FIXED_ISA  // chosen at compile time: sanitizer builds compile only the code that they run
constexpr Isa best_isa() { return Isa::R2F_FIXED_ISA; }
#else
// The widest instruction set of this processor. R2F_CPU_ISA=baseline|avx2 selects a narrower one, for tests.
Isa best_isa();
#endif

#ifdef R2F_X86_DISPATCH
template <typename Kernel>
R2F_TARGET_AVX512 void run_avx512(const Kernel& kernel) {
  kernel.template operator()<64>();
}
template <typename Kernel>
R2F_TARGET_AVX2 void run_avx2(const Kernel& kernel) {
  kernel.template operator()<32>();
}
#endif

// Calls kernel.operator()<Bytes>() with the vector size of best_isa(), compiled for that instruction set. `kernel` is a
// lambda `[&]<int Bytes>() R2F_INLINE_LAMBDA { ... }` that calls functions marked R2F_INLINE.
#define R2F_INLINE_LAMBDA __attribute__((always_inline))
template <typename Kernel>
void dispatch_isa(const Kernel& kernel) {
#if defined(R2F_FIXED_ISA)
  if constexpr (best_isa() == Isa::kBaseline) kernel.template operator()<16>();
#if defined(R2F_X86_DISPATCH)
  else if constexpr (best_isa() == Isa::kAvx2)
    run_avx2(kernel);
  else
    run_avx512(kernel);
#endif
#else
  switch (best_isa()) {
#if defined(R2F_X86_DISPATCH)
    case Isa::kAvx512: return run_avx512(kernel);
    case Isa::kAvx2: return run_avx2(kernel);
#endif
    default: return kernel.template operator()<16>();
  }
#endif
}

// Calls kernel.operator()<T, Bytes>() for the elements' type T; see dispatch_isa.
template <typename Kernel>
void dispatch(DType dtype, const Kernel& kernel) {
  dispatch_isa([&]<int Bytes>() R2F_INLINE_LAMBDA {
    switch (dtype) {
      case DType::kFloat32: return kernel.template operator()<float, Bytes>();
      case DType::kFloat64: return kernel.template operator()<double, Bytes>();
      case DType::kBFloat16: return kernel.template operator()<BFloat16, Bytes>();
    }
  });
}

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

template <typename V>
R2F_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0;
}

// A non-temporal store: it bypasses the caches. `p` must be aligned. Call fence_nontemporal_stores() before another
// thread reads the data.
template <typename V, typename Acc>
R2F_INLINE void store_nontemporal(Acc* p, const V& v) {
  // Assembly, because intrinsics need a target attribute on this function. Sanitizers see ordinary stores.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if constexpr (sizeof(V) == 64)
    asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<V*>(p)) : "v"(v));
  else if constexpr (sizeof(V) == 32)
    asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<V*>(p)) : "x"(v));
  else if constexpr (sizeof(V) == 16)
    asm volatile("movntps %1, %0" : "=m"(*reinterpret_cast<V*>(p)) : "x"(v));
  else
    store(p, v);
#else
  store(p, v);
#endif
}

R2F_INLINE void fence_nontemporal_stores() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

// Loads elements as the accumulation type; bfloat16 is widened in registers.
template <typename V, typename Acc>
R2F_INLINE V load_wide(const Acc* p) {
  return load<V>(p);
}
template <typename V>
R2F_INLINE V load_wide(const BFloat16* p) {
  using Narrow = typename VectorOf<uint16_t, static_cast<int>(sizeof(V) / 2)>::type;
  using Wide = typename VectorOf<uint32_t, static_cast<int>(sizeof(V))>::type;
  Narrow narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  const Wide bits = __builtin_convertvector(narrow, Wide) << 16;
  V v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// Lanes picked from the concatenation of a and b: lane i of the result is lane Index::at(i).
template <typename Index, typename V, size_t... I>
R2F_INLINE V shuffle(const V& a, const V& b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::at(static_cast<int>(I))...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  using Mask = typename VectorOf<Lane, static_cast<int>(sizeof(V))>::type;
  return __builtin_shuffle(a, b, Mask{static_cast<Lane>(Index::at(static_cast<int>(I)))...});
#endif
}
template <typename Index, typename V>
R2F_INLINE V shuffle(const V& a, const V& b) {
  return shuffle<Index>(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>());
}

// Splits the lanes into segments of `Length` and picks the low (or high) half of each segment: first all of a, then all
// of b.
template <int Lanes, int Length, bool High>
struct HalfSegments {
  static constexpr int at(int lane) { return lane / (Length / 2) * Length + lane % (Length / 2) + High * Length / 2; }
};

// The sums over the lanes of each of v[0 .. Count), Count a power of 2. `out` needs space for max(Count, lanes)
// elements, of which the first Count are the result. Lanes are added by halving, so a sum does not depend on the other
// vectors. (Length: how many lanes of a vector remain to be added.)
template <typename Acc, int Bytes, int Count, int Length = VectorOf<Acc, Bytes>::kLanes>
R2F_INLINE void sum_lanes(const typename VectorOf<Acc, Bytes>::type* v, Acc* out) {
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  if constexpr (Length == 1) {
    for (int i = 0; i < Count; ++i) store(out + i * kLanes, v[i]);
  } else {
    constexpr int kNext = Count == 1 ? 1 : Count / 2;
    V next[kNext];
#pragma GCC unroll 8
    for (int i = 0; i < kNext; ++i) {
      const V &a = v[Count == 1 ? 0 : 2 * i], &b = v[Count == 1 ? 0 : 2 * i + 1];
      next[i] = shuffle<HalfSegments<kLanes, Length, false>>(a, b) + shuffle<HalfSegments<kLanes, Length, true>>(a, b);
    }
    sum_lanes<Acc, Bytes, kNext, Length / 2>(next, out);
  }
}

// The sum over the lanes of one vector.
template <typename Acc, int Bytes>
R2F_INLINE Acc sum_lanes(const typename VectorOf<Acc, Bytes>::type& v) {
  Acc total[VectorOf<Acc, Bytes>::kLanes];
  sum_lanes<Acc, Bytes, 1>(&v, total);
  return total[0];
}

// Square roots, lane by lane. Inline assembly, because the compilers' vector extensions have no square root.
template <typename Acc, int Bytes>
R2F_INLINE typename VectorOf<Acc, Bytes>::type square_root(const typename VectorOf<Acc, Bytes>::type& v) {
  typename VectorOf<Acc, Bytes>::type root;
#if defined(R2F_X86_DISPATCH)
  constexpr bool kSingle = sizeof(Acc) == 4;
  if constexpr (Bytes == 16) {
    if constexpr (kSingle)
      asm("sqrtps %1, %0" : "=x"(root) : "x"(v));
    else
      asm("sqrtpd %1, %0" : "=x"(root) : "x"(v));
  } else if constexpr (kSingle) {
    asm("vsqrtps %1, %0" : "=v"(root) : "v"(v));
  } else {
    asm("vsqrtpd %1, %0" : "=v"(root) : "v"(v));
  }
#else
  for (int i = 0; i < VectorOf<Acc, Bytes>::kLanes; ++i) root[i] = __builtin_sqrt(v[i]);
#endif
  return root;
}

}  // namespace r2f::simd
