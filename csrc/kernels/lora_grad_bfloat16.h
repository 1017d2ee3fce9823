// The bfloat16 kernels of lora_grad.cu, on tensor cores.
//
// mma multiplies [16, 16] by [16, 8]. The order of elements along the reduction dimension does not matter as long as
// both factors use the same one, so the 16-byte vectors of a lane are used without a shuffle: 8 neighbouring features,
// or 8 columns of 4 tokens.
#pragma once

#include "kernels/lora_grad_table.h"

namespace r2f {
namespace {

constexpr int kTileTokens = 16, kHalfColumns = 64;

// sums[n] += (16 tokens) x (8 ranks), summed over kSteps * 32 features from k on.
template <int kRankTiles, int kSteps>
__device__ __forceinline__ void add_features(const BFloat16* row0, const BFloat16* row1, const BFloat16* const* A,
                                             int64_t k, int64_t d_in, float (&sums)[kRankTiles][4]) {
  const auto load = [&](auto* loader, const BFloat16* row,
                        int s) {  // zeros past the end of the row, which only the last step reaches
    return kSteps > 1 || k < d_in ? loader(row + k + 32 * s) : uint4{0, 0, 0, 0};
  };
  uint4 u[kSteps], v[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) u[s] = load(load_streaming, row0, s), v[s] = load(load_streaming, row1, s);
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n) {
      const uint4 w = load(load_cached, A[n], s);
      mma_bfloat16(sums[n], u[s].x, v[s].x, u[s].y, v[s].y, w.x, w.y);
      mma_bfloat16(sums[n], u[s].z, v[s].z, u[s].w, v[s].w, w.z, w.w);
    }
}

// Adds the share of warp `warp`: every kSplit-th block of 128 features. The incomplete block at the end of a row
// belongs to the warp that is next in this order.
template <int kRankTiles, int kSplit>
__device__ __forceinline__ void project_tile(const Layer& y, int64_t p, int64_t first, int lane, int warp,
                                             float (&sums)[kRankTiles][4]) {
  const auto row = [&](int64_t token) {  // past the last token: the last one again; replaced by zeros later
    return static_cast<const BFloat16*>(y.x) + (p * y.tokens + (token < y.tokens ? token : y.tokens - 1)) * y.d_in;
  };
  const BFloat16 *row0 = row(first + lane / 4), *row1 = row(first + lane / 4 + 8), *A[kRankTiles];
#pragma unroll
  for (int n = 0; n < kRankTiles; ++n) {
    const int rank = n * 8 + lane / 4;
    A[n] = static_cast<const BFloat16*>(y.A) + (p % y.A_groups * y.rank + (rank < y.rank ? rank : y.rank - 1)) * y.d_in;
  }
  const int own = lane % 4 * 8;
  const int64_t blocks = y.d_in / 128;
  for (int64_t b = warp; b < blocks; b += kSplit)
    add_features<kRankTiles, 4>(row0, row1, A, b * 128 + own, y.d_in, sums);
  if (blocks % kSplit != warp) return;
  for (int64_t k = blocks * 128; k < y.d_in; k += 32) add_features<kRankTiles, 1>(row0, row1, A, k + own, y.d_in, sums);
}

template <int kNumbers, int kSplit>
struct WarpParts {
  float sums[kSplit][kNumbers][kWarpSize];
};

// Adds up what the kSplit warps of a block hold, in a fixed order, into the sums of warp 0.
template <int kNumbers, int kSplit>
__device__ __forceinline__ void add_warps(float* sums, int lane, int warp) {
  using Shared = WarpParts<kNumbers, kSplit>;
  R2F_DYNAMIC_SHARED(Shared, shared);
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) shared.sums[warp][i][lane] = sums[i];
#ifndef R2F_PLANTED_BUG
  __syncthreads();
#endif
  if (warp > 0) return;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i)
#pragma unroll
    for (int w = 1; w < kSplit; ++w) sums[i] += shared.sums[w][i][lane];
}

// U [groups, tiles, kRankTiles, 32 lanes, 4 words]: the mma fragments that accumulate_bfloat16 reads. Rank j of token t
// is in lane j * 4 + t / 4; the high parts of a pair of tokens are in word t % 4 / 2 * 2, their low parts in the next
// word. A block of kSplit warps processes one item; its warps divide the features. With kSplit = 1, each warp of the
// block processes an item of its own.
template <int kRankTiles, int kSplit>
__global__ void __launch_bounds__(kProjectWarps* kWarpSize) project_bfloat16(const __grid_constant__ Table table) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t item = kSplit > 1 ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kProjectWarps + warp;
  if (item >= table.projects) return;
  const Layer& y = layer_of<&Layer::first_project>(table, item);
  const int64_t tiles = (y.tokens + kTileTokens - 1) / kTileTokens, index = item - y.first_project;
  const int64_t p = index / tiles, first = index % tiles * kTileTokens;
  float sums[kRankTiles][4] = {};
  project_tile<kRankTiles, kSplit>(y, p, first, lane, kSplit > 1 ? warp : 0, sums);
  if constexpr (kSplit > 1) {
    add_warps<kRankTiles * 4, kSplit>(sums[0], lane, warp);
    if (warp > 0) return;
  }

#pragma unroll
  for (int n = 0; n < kRankTiles; ++n) {
    BFloat16* U = reinterpret_cast<BFloat16*>(y.U) + (index * kRankTiles + n) * kWarpSize * 8;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = lane / 4 + e / 2 * 8, rank = lane % 4 * 2 + e % 2;
      const float value = first + token < y.tokens ? sums[n][e] : 0.0f;
      const BFloat16 high = narrow(value);
      const int place = (rank * 4 + token / 4) * 8 + token % 4 / 2 * 4 + token % 2;
      U[place] = high;
      U[place + 2] = narrow(value - widen(high));
    }
  }
}

// sums[n][i] += (ranks 8 n to 8 n + 7; high and low parts are rows of one product) x (columns i, i + 8, ... of 64),
// summed over kTiles * 16 tokens. The lane's own 8 columns start at `delta`.
template <int kRankTiles, int kTiles>
__device__ __forceinline__ void add_tiles(const Layer& y, const BFloat16* delta, const float* U, int64_t tile, int lane,
                                          float (&sums)[kRankTiles][8][4]) {
  uint4 v[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // U is zero for tokens beyond the last one
      const int64_t token = (tile + t) * kTileTokens + lane % 4 * 4 + i;
      v[t][i] = load_streaming(delta + (token < y.tokens ? token : y.tokens - 1) * y.d_out);
    }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    uint32_t pairs[8][2];  // two neighbouring tokens in a word, for each of the lane's 8 columns
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 a = v[t][2 * h], b = v[t][2 * h + 1];
      const uint32_t one[4] = {a.x, a.y, a.z, a.w}, two[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        pairs[2 * w][h] = (one[w] & 0xffffu) | two[w] << 16;
        pairs[2 * w + 1][h] = one[w] >> 16 | (two[w] & 0xffff0000u);
      }
    }
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n) {
      const uint4 u = load_cached(U + (((tile + t) * kRankTiles + n) * kWarpSize + lane) * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) mma_bfloat16(sums[n][i], u.x, u.y, u.z, u.w, pairs[i][0], pairs[i][1]);
    }
  }
}

// A block of kSplit warps processes one item; its warps divide the tokens.
template <int kRankTiles, int kSplit>
__global__ void __launch_bounds__(kSplit* kWarpSize, 1) accumulate_bfloat16(const __grid_constant__ Table table) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t item = blockIdx.x;
  const Layer& y = layer_of<&Layer::first_accumulate>(table, item);
  const int64_t stripes = (y.d_out + kHalfColumns - 1) / kHalfColumns, index = item - y.first_accumulate;
  const int64_t p = index / stripes, first_column = index % stripes * kHalfColumns;
  const int64_t tiles = (y.tokens + kTileTokens - 1) / kTileTokens, mine = first_column + lane / 4 * 8;
  const BFloat16* delta =
      static_cast<const BFloat16*>(y.delta) + p % y.delta_groups * y.tokens * y.d_out + (mine < y.d_out ? mine : 0);
  const float* U = y.U + p % y.x_groups * tiles * kRankTiles * kWarpSize * 4;
  float sums[kRankTiles][8][4] = {};
  for (int64_t pair = warp; pair < tiles / 2; pair += kSplit)
    add_tiles<kRankTiles, 2>(y, delta, U, pair * 2, lane, sums);
  if (tiles % 2 == 1 && tiles / 2 % kSplit == warp) add_tiles<kRankTiles, 1>(y, delta, U, tiles - 1, lane, sums);

  float both[kRankTiles][16];  // products of the high and of the low parts together
#pragma unroll
  for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
    for (int i = 0; i < 16; ++i) both[n][i] = sums[n][i % 8][i / 8] + sums[n][i % 8][2 + i / 8];
  if constexpr (kSplit > 1) {
    add_warps<kRankTiles * 16, kSplit>(both[0], lane, warp);
    if (warp > 0) return;
  }
  const int64_t column = first_column + lane % 4 * 16;
#pragma unroll
  for (int n = 0; n < kRankTiles; ++n) {
    const int rank = n * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (rank < y.rank && column + i < y.d_out) {
        float& out = y.grad_B[(p * y.d_out + column + i) * y.rank + rank];
        out = y.adds ? out + y.scale * both[n][i] : y.scale * both[n][i];
      }
  }
}

}  // namespace
}  // namespace r2f
