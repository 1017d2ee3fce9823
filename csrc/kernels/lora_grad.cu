// LoRA-factor gradients of all layers of a model in two launches. See lora_grad.h for the formulas.
//
//   project:     U = x A^T. A warp processes a few tokens of one layer; its lanes divide the features.
//   accumulate:  grad_B = scale delta^T U. A warp processes a stripe of columns of one group of one layer.
//
// The kernels are memory-bound: x and delta are each read once, by 16-byte loads that do not allocate in L1 (A and U
// stay there), several in flight in each lane. The table of layers is a kernel parameter (constant memory). float32
// products run on the FMA units, bfloat16 products on tensor cores, where U is stored as the sum of two bfloat16
// numbers (16 significant bits instead of 8). Sums have a fixed order: results are deterministic.
#include "kernels/lora_grad.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

struct Layer {
  const void *x, *delta, *A;
  float *U, *grad_B;
  int64_t tokens, d_in, d_out;
  int64_t project_tokens;                   // per group; in float32 all groups that share A count as one group
  int64_t A_stride;                         // elements from one group's A to the next; 0 if shared
  int64_t first_project, first_accumulate;  // index of the layer's first item of each kernel
  float scale;
  int rank;
};

constexpr int kMaxLayers = 64;

struct Table {
  Layer layers[kMaxLayers];
  int count;
  int64_t projects, accumulates;  // items
};
static_assert(sizeof(Table) <= 32764, "the kernel parameters of CUDA 12.1 and newer; older versions take 4 KB");

// The layer that an item belongs to, by binary search: the last one with first item <= item.
template <int64_t Layer::* first>
__device__ __forceinline__ const Layer& layer_of(const Table& table, int64_t item) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.layers[middle].*first <= item ? low : high) = middle;
  }
  return table.layers[low];
}

// ---- float32 --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy(uint4 words, float (&out)[4]) { memcpy(out, &words, sizeof(words)); }

constexpr int kProjectWarps = 4;

template <int R>
constexpr int kTokensOf = R == 16 ? 4 : 8;    // of a project item
constexpr int kFloatColumns = 4 * kWarpSize;  // of an accumulate item

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
  const float* A = static_cast<const float*>(y.A) + p * y.A_stride;
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
  const float* delta = static_cast<const float*>(y.delta) + p * y.tokens * y.d_out + (column < y.d_out ? column : 0);
  const float* U = y.U + p * y.tokens * R;
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

// Stores four ranks of one column, times the scale. `all`: all four exist and the address is aligned.
__device__ __forceinline__ void store_ranks(const Layer& y, int64_t p, int64_t column, int j, float4 v, bool all) {
  if (column >= y.d_out) return;
  float* out = y.grad_B + (p * y.d_out + column) * y.rank + j;
  v = make_float4(y.scale * v.x, y.scale * v.y, y.scale * v.z, y.scale * v.w);
  if (all) {
    *reinterpret_cast<float4*>(out) = v;
    return;
  }
  if (j < y.rank) out[0] = v.x;
  if (j + 1 < y.rank) out[1] = v.y;
  if (j + 2 < y.rank) out[2] = v.z;
  if (j + 3 < y.rank) out[3] = v.w;
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

// ---- bfloat16 on tensor cores ---------------------------------------------------------------------------------------
//
// mma multiplies [16, 16] by [16, 8]. The order of elements along the reduction dimension does not matter as long as
// both factors use the same one, so the 16-byte vectors of a lane are used without a shuffle: 8 neighbouring features,
// or 8 columns of 4 tokens.

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

// The part `warp` of kSplit: every kSplit-th block of 128 features; what remains at the end of a row is the next one's.
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
    A[n] = static_cast<const BFloat16*>(y.A) + p * y.A_stride + (rank < y.rank ? rank : y.rank - 1) * y.d_in;
  }
  const int own = lane % 4 * 8;
  const int64_t blocks = y.d_in / 128;
  for (int64_t b = warp; b < blocks; b += kSplit)
    add_features<kRankTiles, 4>(row0, row1, A, b * 128 + own, y.d_in, sums);
  if (blocks % kSplit != warp) return;
  for (int64_t k = blocks * 128; k < y.d_in; k += 32)
    add_features<kRankTiles, 1>(row0, row1, A, k + own, y.d_in, sums);
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
  const BFloat16* delta = static_cast<const BFloat16*>(y.delta) + p * y.tokens * y.d_out + (mine < y.d_out ? mine : 0);
  const float* U = y.U + p * tiles * kRankTiles * kWarpSize * 4;
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
      if (rank < y.rank && column + i < y.d_out)
        y.grad_B[(p * y.d_out + column + i) * y.rank + rank] = y.scale * both[n][i];
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// With fewer items than this, one warp per item does not saturate the memory of a large GPU (measured on an H100). Then
// kSplit warps share an item, or, where items stay whole, each is a block of its own, so that all multiprocessors work.
constexpr int64_t kFewItems = 2048;

unsigned blocks_of(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

template <int R>
void launch_float(const Table& table, cudaStream_t stream) {
  constexpr int kSplit = R == 16 ? 4 : 8;
  const int warps = table.projects < kFewItems ? 1 : kProjectWarps;
  if (table.projects > 0)
    launch(project_float<R>, blocks_of(table.projects, warps), warps * kWarpSize, 0, stream, table);
  if (table.accumulates == 0) return;
  const auto blocks = static_cast<unsigned>(table.accumulates);
  if (table.accumulates < kFewItems)
    launch(accumulate_float<R, kSplit>, blocks, kSplit * kWarpSize, sizeof(Parts<R, kSplit>), stream, table);
  else
    launch(accumulate_float<R, 1>, blocks, kWarpSize, 0, stream, table);
}

template <int kRankTiles>
void launch_bfloat16(const Table& table, cudaStream_t stream) {
  constexpr int kSplit = kProjectWarps, kThreads = kSplit * kWarpSize;
  if (table.projects >= kFewItems)
    launch(project_bfloat16<kRankTiles, 1>, blocks_of(table.projects, kProjectWarps), kThreads, 0, stream, table);
  else if (table.projects > 0)
    launch(project_bfloat16<kRankTiles, kSplit>, blocks_of(table.projects, 1), kThreads,
           sizeof(WarpParts<kRankTiles * 4, kSplit>), stream, table);
  if (table.accumulates >= kFewItems)
    launch(accumulate_bfloat16<kRankTiles, 1>, blocks_of(table.accumulates, 1), kWarpSize, 0, stream, table);
  else if (table.accumulates > 0)
    launch(accumulate_bfloat16<kRankTiles, kSplit>, blocks_of(table.accumulates, 1), kThreads,
           sizeof(WarpParts<kRankTiles * 16, kSplit>), stream, table);
}

// The kernel instantiation for the largest rank of all layers, and the sizes of its items.
struct Plan {
  int ranks, project_tokens, columns;
  void (*launch)(const Table&, cudaStream_t);
};

Plan plan_of(DType dtype, const LoraGradLayer* layers, int64_t count) {
  int64_t rank = 1;
  for (int64_t l = 0; l < count; ++l) rank = layers[l].rank > rank ? layers[l].rank : rank;
  if (dtype == DType::kBFloat16) {
    if (rank <= 8) return {8, kTileTokens, kHalfColumns, launch_bfloat16<1>};
    if (rank <= 16) return {16, kTileTokens, kHalfColumns, launch_bfloat16<2>};
    return {32, kTileTokens, kHalfColumns, launch_bfloat16<4>};
  }
  if (rank <= 4) return {4, kTokensOf<4>, kFloatColumns, launch_float<4>};
  if (rank <= 8) return {8, kTokensOf<8>, kFloatColumns, launch_float<8>};
  return {16, kTokensOf<16>, kFloatColumns, launch_float<16>};
}

// Size of one layer's U, in floats.
int64_t workspace_of(DType dtype, const LoraGradLayer& layer, const Plan& plan) {
  if (dtype == DType::kFloat32) return layer.groups * layer.tokens * plan.ranks;
  return layer.groups * ((layer.tokens + kTileTokens - 1) / kTileTokens) * kTileTokens * plan.ranks;
}

Layer layer_from(DType dtype, const LoraGradLayer& from, float* U, const Plan& plan, Table& table) {
  const bool one_A = !from.A_per_group && dtype == DType::kFloat32;
  Layer to{};
  to.x = from.x, to.delta = from.delta, to.A = from.A, to.U = U, to.grad_B = from.grad_B;
  to.tokens = from.tokens, to.d_in = from.d_in, to.d_out = from.d_out;
  to.project_tokens = one_A ? from.groups * from.tokens : from.tokens;
  to.A_stride = from.A_per_group ? from.rank * from.d_in : 0;
  to.scale = static_cast<float>(from.scale), to.rank = static_cast<int>(from.rank);
  to.first_project = table.projects, to.first_accumulate = table.accumulates;
  table.projects += (one_A ? 1 : from.groups) * ((to.project_tokens + plan.project_tokens - 1) / plan.project_tokens);
  table.accumulates += from.groups * ((from.d_out + plan.columns - 1) / plan.columns);
  return to;
}

}  // namespace

bool lora_grad_cuda_takes(DType dtype, const LoraGradLayer& layer) {
  if (dtype == DType::kFloat64 || layer.rank > (dtype == DType::kFloat32 ? 16 : 32)) return false;
  const int64_t vector = dtype == DType::kFloat32 ? 4 : 8;
  const auto addresses = reinterpret_cast<uintptr_t>(layer.x) | reinterpret_cast<uintptr_t>(layer.delta) |
                         reinterpret_cast<uintptr_t>(layer.A);
  return layer.d_in % vector == 0 && layer.d_out % vector == 0 && addresses % 16 == 0;
}

int64_t lora_grad_cuda_workspace(DType dtype, const LoraGradLayer* layers, int64_t count) {
  const Plan plan = plan_of(dtype, layers, count);
  int64_t size = 0;
  for (int64_t l = 0; l < count; ++l) size += workspace_of(dtype, layers[l], plan);
  return size;
}

const char* lora_grad_cuda(DType dtype, const LoraGradLayer* layers, int64_t count, float* workspace, void* stream) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  const Plan plan = plan_of(dtype, layers, count);
  for (int64_t first = 0; first < count; first += kMaxLayers) {
    Table table{};
    table.count = static_cast<int>(count - first < kMaxLayers ? count - first : kMaxLayers);
    for (int l = 0; l < table.count; ++l) {
      table.layers[l] = layer_from(dtype, layers[first + l], workspace, plan, table);
      workspace += workspace_of(dtype, layers[first + l], plan);
    }
    if (table.projects > kMaxBlocks || table.accumulates > kMaxBlocks)
      return "too many groups for one launch";
    plan.launch(table, static_cast<cudaStream_t>(stream));
  }
  return launch_error();
}

}  // namespace r2f
