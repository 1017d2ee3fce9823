// The element types of the kernels, defined without torch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define R2F_HOST_DEVICE __host__ __device__ inline
#else
#define R2F_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace r2f {

enum class DType { kFloat32, kFloat64, kBFloat16 };

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// The type in which sums are accumulated and results are returned.
template <typename T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename T>
using Accumulation = typename AccumulationOf<T>::type;

R2F_HOST_DEVICE float widen(float v) { return v; }
R2F_HOST_DEVICE double widen(double v) { return v; }
R2F_HOST_DEVICE float widen(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

// Rounded to nearest, ties to even; NaN stays NaN.
R2F_HOST_DEVICE BFloat16 narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if (v != v) return {static_cast<uint16_t>(0x7fc0)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace r2f
