// The element types that kernels take, without torch.
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

// The upper half of a float32; only ever widened, so it needs no arithmetic.
struct BFloat16 {
  uint16_t bits;
};

// The type that sums are taken in, and results returned in.
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

}  // namespace r2f
