// The float32 kernels of lora_grad.cu, on FMA units.
#pragma once

#include "kernels/lora_grad_table.h"

namespace r2f {
namespace {

__device__ __forceinline__ void copy(uint4 words, float (&out)[4]) { memcpy(out, &words, sizeof(words)); }

template <int R>
constexpr int kTokensOf = R == 16 ? 4 : 8;    // tokens per project item
constexpr int kFloatColumns = 4 * kWarpSize;  // columns per accumulate item

// sum[k * R + j] += <row k, A_j> over this lane's features. Ranks from y.rank on repeat the last row of A.
template <int R>
__device__ __forceinline__ void add_features(const Layer& y, const float* (&rows)[kTokensOf<R>], const float* A,
                                             float (&sum)[kTokensOf<R> * R]) {
  for (int64_t i = threadIdx.x % kWarpSize * 4; i < y.d_in; i += 4 * kWarpSize) {
    float v[kTokensOf<R>][4];
#pragma unroll
    for (int k = 0; k < kTokensOf<R>; ++k) copy(load_streaming(rows[k] + i), v[k]);
#pragma unroll
    for (int j = 0; j < R; ++j) {
      float w[4];
      copy(load_cached(A + (j < y.rank ? j : y.rank - 1) * y.d_in + i), w);
#pragma unroll
      for (int k = 0; k < kTokensOf<R>; ++k)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[k * R + j] += v[k][c] * w[c];
    }
  }
}

// U [all tokens, R]
template <int R>
__global__ void __launch_bounds__(kProjectWarps* kWarpSize) project_float(const __grid_constant__ Table table) {
  constexpr int kTokens = kTokensOf<R>, kSums = kTokens * R, kEach = kSums / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (item >= table.projects) return;
  const Layer& y = layer_of<&Layer::first_project>(table, item);
  const int64_t tiles = (y.project_tokens + kTokens - 1) / kTokens, index = item - y.first_project;
  const int64_t p = index / tiles, first = index % tiles * kTokens, row = p * y.project_tokens + first;
  const int64_t left = y.project_tokens - first;

  const float* rows[kTokens];
#pragma unroll
  for (int k = 0; k < kTokens; ++k)  // past the last token: the last one again; its result is not stored
    rows[k] = static_cast<const float*>(y.x) + (row + (k < left ? k : left - 1)) * y.d_in;
  const float* A = static_cast<const float*>(y.A) + p % y.A_groups * y.rank * y.d_in;
  float sum[kSums] = {};
  add_features<R>(y, rows, A, sum);

  // Reduces over the lanes by recursive halving: in each round a lane exchanges half of its partial sums, and at the
  // end it holds kEach complete sums.
#pragma unroll
  for (int other = kWarpSize / 2, kept = kSums / 2; other >= 1; other /= 2, kept /= 2) {
    const bool upper = lane & other;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      if (i >= kept) break;
      const float given = upper ? sum[i] : sum[i + kept], own = upper ? sum[i + kept] : sum[i];
      sum[i] = own + __shfl_xor_sync(0xffffffffu, given, other);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = lane * kEach + i;
    if (place / R < left) y.U[row * R + place] = sum[i];
  }
}

// sum[c][j] += delta[k, column + c] U[k, j] over every kSplit-th token k from `first` on.
template <int R, int kSplit>
__device__ __forceinline__ void add_tokens(const Layer& y, int64_t p, int64_t column, int first, float (&sum)[4][R]) {
  constexpr int kInFlight = R <= 8 ? 8 : 4;
  const float* delta =
      static_cast<const float*>(y.delta) + p % y.delta_groups * y.tokens * y.d_out + (column < y.d_out ? column : 0);
  const float* U = y.U + p % y.x_groups * y.tokens * R;
  const auto add = [&](const float (&v)[4], int64_t k) {
#pragma unroll
    for (int j = 0; j < R; j += 4) {
      const float4 u = *reinterpret_cast<const float4*>(U + k * R + j);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[c][j] += v[c] * u.x, sum[c][j + 1] += v[c] * u.y;
        sum[c][j + 2] += v[c] * u.z, sum[c][j + 3] += v[c] * u.w;
      }
    }
  };
  int64_t k = first;
  for (; k + (kInFlight - 1) * kSplit < y.tokens; k += kInFlight * kSplit) {
    float v[kInFlight][4];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) copy(load_streaming(delta + (k + i * kSplit) * y.d_out), v[i]);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add(v[i], k + i * kSplit);
  }
  for (; k < y.tokens; k += kSplit) {
    float v[4];
    copy(load_streaming(delta + k * y.d_out), v);
    add(v, k);
  }
}

// Stores, or adds, four ranks of one column, times the scale. `all`: all four exist and the address is aligned.
__device__ __forceinline__ void store_ranks(const Layer& y, int64_t p, int64_t column, int j, float4 v, bool all) {
  if (column >= y.d_out) return;
  float* out = y.grad_B + (p * y.d_out + column) * y.rank + j;
  v = make_float4(y.scale * v.x, y.scale * v.y, y.scale * v.z, y.scale * v.w);
  if (all) {
    float4* whole = reinterpret_cast<float4*>(out);
    if (y.adds) v = make_float4(whole->x + v.x, whole->y + v.y, whole->z + v.z, whole->w + v.w);
    *whole = v;
    return;
  }
  if (j < y.rank) out[0] = y.adds ? out[0] + v.x : v.x;
  if (j + 1 < y.rank) out[1] = y.adds ? out[1] + v.y : v.y;
  if (j + 2 < y.rank) out[2] = y.adds ? out[2] + v.z : v.z;
  if (j + 3 < y.rank) out[3] = y.adds ? out[3] + v.w : v.w;
}

template <int R, int kSplit>
struct Parts {
  float4 sums[kSplit][R][kWarpSize];  // [R]: four columns of R / 4 vectors
};

// A block of kSplit warps processes one item; its warps divide the tokens.
template <int R, int kSplit>
__global__ void __launch_bounds__(kSplit* kWarpSize) accumulate_float(const __grid_constant__ Table table) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t item = blockIdx.x;
  const Layer& y = layer_of<&Layer::first_accumulate>(table, item);
  const int64_t stripes = (y.d_out + kFloatColumns - 1) / kFloatColumns, index = item - y.first_accumulate;
  const int64_t p = index / stripes, column = index % stripes * kFloatColumns + lane * 4;
  float sum[4][R] = {};
  add_tokens<R, kSplit>(y, p, column, warp, sum);

  const bool all = y.rank == R;
  const auto part = [&](int i) {  // i: column i / (R / 4), ranks from i % (R / 4) * 4 on
    const float* from = sum[i / (R / 4)] + i % (R / 4) * 4;
    return make_float4(from[0], from[1], from[2], from[3]);
  };
  if constexpr (kSplit == 1) {
#pragma unroll
    for (int i = 0; i < R; ++i) store_ranks(y, p, column + i / (R / 4), i % (R / 4) * 4, part(i), all);
  } else {
    using Shared = Parts<R, kSplit>;
    R2F_DYNAMIC_SHARED(Shared, shared);
#pragma unroll
    for (int i = 0; i < R; ++i) shared.sums[warp][i][lane] = part(i);
#ifndef R2F_PLANTED_BUG
    __syncthreads();
#endif
    for (int i = warp; i < R; i += kSplit) {
      float4 total = shared.sums[0][i][lane];
#pragma unroll
      for (int w = 1; w < kSplit; ++w) {
        const float4 more = shared.sums[w][i][lane];
        total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
      }
      store_ranks(y, p, column + i / (R / 4), i % (R / 4) * 4, total, all);
    }
  }
}

}  // namespace
}  // namespace r2f
