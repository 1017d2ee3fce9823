// Helpers of every CUDA kernel source. nvcc compiles the source for the GPU; a C++20 compiler compiles the same source
// for the emulator (cuda_emu.h).
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// Declares `name`, a reference to the block's dynamic shared memory seen as one `Type`.
#define R2F_DYNAMIC_SHARED(Type, name)                              \
  extern __shared__ __align__(16) unsigned char r2f_shared_bytes[]; \
  Type& name = *reinterpret_cast<Type*>(r2f_shared_bytes)

namespace r2f {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}

// Loads 16 aligned bytes that are read once, without allocating an L1 line.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Loads 16 aligned bytes through the read-only cache: they are read again, and this kernel does not write them.
__device__ __forceinline__ uint4 load_cached(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// c [16, 8] += a [16, 16] b [16, 8] by a whole warp on tensor cores (PTX: mma.m16n8k16). Each register of a and
// b holds two bfloat16 numbers.
__device__ __forceinline__ void mma_bfloat16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The CUDA error message of the launches since the last call; null if there was no error.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace r2f

#else

#include "r2f/cuda_emu.h"

#define R2F_DYNAMIC_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(r2f::emu::block->shared)

namespace r2f {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  auto call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  emu::run_grid(grid, block, shared_bytes, [](void* self) { (*static_cast<decltype(call)*>(self))(); }, &call);
}

// C++ versions of the loads and of the tensor-core product.
inline uint4 load_streaming(const void* p) { return *static_cast<const uint4*>(p); }
inline uint4 load_cached(const void* p) { return *static_cast<const uint4*>(p); }
#define mma_bfloat16(...) r2f::emu::mma_bfloat16(__LINE__, __VA_ARGS__)

inline const char* launch_error() { return nullptr; }  // the emulator throws

}  // namespace r2f

#endif

namespace r2f {

constexpr int kWarpSize = 32;

// Blocks of a one-dimensional grid whose kernel loops over `items` with stride gridDim.x: at most what CUDA allows.
inline unsigned grid_for(int64_t items) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  return static_cast<unsigned>(items < kMaxBlocks ? items : kMaxBlocks);
}

// Butterfly sum over a warp; every lane gets the result. The order of additions is fixed.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int other = kWarpSize / 2; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// N neighbouring elements, read by one instruction where the address allows it.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T element[N];
};

// Loads p[0 .. N); elements from `available` on are zero. `aligned`: p is aligned to the pack's size and all N elements
// are available.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p, int64_t available, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<T, N>*>(p);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.element[i] = i < available ? p[i] : T{};
  return pack;
}

// Stores the first `available` elements to p; `aligned` as in load_pack.
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack, int64_t available, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < available) p[i] = pack.element[i];
}

}  // namespace r2f
