// What the CUDA kernels of LoRA-factor gradients and of their tangents share. Included by .cu files only.
#pragma once

#include "r2f/cuda.h"
#include "r2f/dtype.h"

namespace r2f::tiles {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kProjectTokens = 4, kProjectRanks = 8;  // a warp's sums: one for each lane to write
static_assert(kProjectTokens * kProjectRanks == kWarpSize);
constexpr int kTileTokens = 64;  // rows of U in shared memory

// 16 bytes of float or double; of bfloat16 8, or accumulate would need too many registers.
template <typename T>
constexpr int kPack = sizeof(T) == 8 ? 2 : 4;

// u [left, rank] = x w^T for a few rows of one group, by one warp.
template <typename T, bool kByFeature>
__device__ __forceinline__ void project_rows(const T* x, int64_t left, const T* w, Accumulation<T>* u, int64_t features,
                                             int64_t rank, bool aligned) {
  using Acc = Accumulation<T>;
  constexpr int kVec = kPack<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int64_t j0 = 0; j0 < rank; j0 += kProjectRanks) {
    Acc sum[kProjectTokens][kProjectRanks] = {};
    for (int64_t i = lane * kVec; i < features; i += kWarpSize * kVec) {
      Pack<T, kVec> token[kProjectTokens];
#pragma unroll
      for (int t = 0; t < kProjectTokens; ++t) {
        const int64_t row = t < left ? t : 0;  // a token that is not there: any row will do, its sum is not written
        token[t] = load_pack<T, kVec>(x + row * features + i, features - i, aligned);
      }
#pragma unroll
      for (int j = 0; j < kProjectRanks; ++j) {
        if (j0 + j >= rank) break;
        Acc weight[kVec];
        if constexpr (kByFeature) {
#pragma unroll
          for (int c = 0; c < kVec; ++c) weight[c] = i + c < features ? widen(w[(i + c) * rank + j0 + j]) : Acc(0);
        } else {
          const auto pack = load_pack<T, kVec>(w + (j0 + j) * features + i, features - i, aligned);
#pragma unroll
          for (int c = 0; c < kVec; ++c) weight[c] = widen(pack.element[c]);
        }
#pragma unroll
        for (int t = 0; t < kProjectTokens; ++t)
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[t][j] += widen(token[t].element[c]) * weight[c];
      }
    }
    Acc mine = 0;
#pragma unroll
    for (int t = 0; t < kProjectTokens; ++t)
#pragma unroll
      for (int j = 0; j < kProjectRanks; ++j) {
        const Acc total = warp_sum(sum[t][j]);
        if (lane == t * kProjectRanks + j) mine = total;
      }
    const int t = lane / kProjectRanks, j = lane % kProjectRanks;
    if (t < left && j0 + j < rank) u[t * rank + j0 + j] = mine;
  }
}

template <typename T, int kRanks>
struct AccumulateShared {
  static constexpr int kColumns = kWarpSize * kPack<T>;
  Accumulation<T> u[kTileTokens][kRanks];
  Accumulation<T> partial[kWarps][kColumns];
  Accumulation<T> total[kRanks][kColumns];
};

// sum [kRanks][pack] += u^T x over `tokens` rows, for this thread's columns and its warp's share of the rows. `u`
// starts at the first of the ranks, of which `ranks` exist, and has rows of `rank`; x starts at the thread's columns,
// of which `columns` exist. Called by all threads of a block.
template <typename T, int kRanks>
__device__ __forceinline__ void add_rows(const T* x, int64_t features, int64_t columns, bool aligned,
                                         const Accumulation<T>* u, int64_t rank, int64_t ranks, int64_t tokens,
                                         AccumulateShared<T, kRanks>& shared,
                                         Accumulation<T> (&sum)[kRanks][kPack<T>]) {
  using Acc = Accumulation<T>;
  constexpr int kVec = kPack<T>;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  for (int64_t t0 = 0; t0 < tokens; t0 += kTileTokens) {
    __syncthreads();  // all have read the tile before
    for (int i = thread; i < kTileTokens * kRanks; i += kThreads) {
      const int t = i / kRanks, j = i % kRanks;
      shared.u[t][j] = t0 + t < tokens && j < ranks ? u[(t0 + t) * rank + j] : Acc(0);
    }
#ifndef R2F_PLANTED_BUG  // the tests leave this barrier out and must notice
    __syncthreads();
#endif
    const int64_t left = tokens - t0;
    const int count = left < kTileTokens ? static_cast<int>(left) : kTileTokens;
    if (columns <= 0) continue;
    for (int t = warp; t < count; t += kWarps) {
      const auto pack = load_pack<T, kVec>(x + (t0 + t) * features, columns, aligned);
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        const Acc factor = shared.u[t][j];
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[j][c] += widen(pack.element[c]) * factor;
      }
    }
  }
}

// shared.total = the warps' sums together, one rank after another.
template <typename T, int kRanks>
__device__ __forceinline__ void add_up_warps(const Accumulation<T> (&sum)[kRanks][kPack<T>],
                                             AccumulateShared<T, kRanks>& shared) {
  constexpr int kVec = kPack<T>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
#pragma unroll
  for (int j = 0; j < kRanks; ++j) {
#pragma unroll
    for (int c = 0; c < kVec; ++c) shared.partial[warp][lane * kVec + c] = sum[j][c];
    __syncthreads();
    if (thread < AccumulateShared<T, kRanks>::kColumns) {
      Accumulation<T> total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.partial[w][thread];
      shared.total[j][thread] = total;
    }
    __syncthreads();
  }
}

template <typename T>
bool aligned(const void* a, const void* b, int64_t features) {
  constexpr uintptr_t kBytes = sizeof(Pack<T, kPack<T>>);
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % kBytes == 0 && features % kPack<T> == 0;
}

}  // namespace r2f::tiles
