// Distances of factored gradients on the CPU. See factored_matching_loss.h for what is computed.
//
// Gram matrices are made in tiles that stay in the first-level cache, used at once and forgotten; of a symmetric one
// only the upper half is made. Dense products with G* are the library's (csrc/torch).
#include "kernels/factored_matching_loss.h"

#include <algorithm>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

constexpr int64_t kTile = 32;  // tokens

template <typename Acc>
struct alignas(64) Tile {
  Acc at[kTile][kTile];
};

// Rows of features: one item's x or delta.
template <typename Acc>
struct Matrix {
  const Acc* data;
  int64_t rows, features;
  R2F_INLINE const Acc* row(int64_t i) const { return data + i * features; }
  R2F_INLINE int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  R2F_INLINE int64_t tile_rows(int64_t tile) const { return std::min(kTile, rows - tile * kTile); }
};

// out [Rows, Columns] = a b^T, dot products of features.
template <typename Acc, int Bytes, int Rows, int Columns>
R2F_INLINE void dot_block(const Acc* a, const Acc* b, int64_t features, Acc* out) {
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  V sum[Rows][Columns] = {};
  int64_t k = 0;
  for (; k + kLanes <= features; k += kLanes) {
    V left[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) left[r] = simd::load<V>(a + r * features + k);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const V right = simd::load<V>(b + c * features + k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r][c] += left[r] * right;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      Acc total = simd::sum_lanes<Acc, Bytes>(sum[r][c]);
      for (int64_t rest = k; rest < features; ++rest) total += a[r * features + rest] * b[c * features + rest];
      out[r * kTile + c] = total;
    }
  }
}

template <typename Acc, int Bytes, int Rows>
R2F_INLINE void dot_rows(const Acc* a, const Acc* b, int64_t columns, int64_t features, Acc* out) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) dot_block<Acc, Bytes, Rows, 4>(a, b + c * features, features, out + c);
  for (; c < columns; ++c) dot_block<Acc, Bytes, Rows, 1>(a, b + c * features, features, out + c);
}

// The tile (i, j) of a b^T.
template <typename Acc, int Bytes>
R2F_INLINE void gram_tile(const Matrix<Acc>& a, int64_t i, const Matrix<Acc>& b, int64_t j, Tile<Acc>& tile) {
  constexpr int kRows = Bytes == 64 ? 4 : 2;  // with AVX-512 there are 32 registers, else 16
  const int64_t rows = a.tile_rows(i), columns = b.tile_rows(j), features = a.features;
  const Acc *left = a.row(i * kTile), *right = b.row(j * kTile);
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_rows<Acc, Bytes, kRows>(left + r * features, right, columns, features, tile.at[r]);
  for (; r < rows; ++r) dot_rows<Acc, Bytes, 1>(left + r * features, right, columns, features, tile.at[r]);
}

// out [Rows, Vectors] += factors [Rows, count] y [count, Vectors].
template <typename Acc, int Bytes, int Rows, int Vectors>
R2F_INLINE void add_block(const Acc* factors, const Acc* y, int64_t count, int64_t features, Acc* out) {
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  V sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = simd::load<V>(out + r * features + v * kLanes);
  }
  for (int64_t m = 0; m < count; ++m) {
    V right[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) right[v] = simd::load<V>(y + m * features + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Acc factor = factors[r * kTile + m];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] += right[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) simd::store(out + r * features + v * kLanes, sum[r][v]);
  }
}

template <typename Acc, int Bytes, int Rows>
R2F_INLINE void add_rows(const Acc* factors, const Acc* y, int64_t count, int64_t features, Acc* out) {
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes, kVectors = Rows == 1 ? 4 : (Bytes == 64 ? 4 : 2);
  int64_t k = 0;
  for (; k + kVectors * kLanes <= features; k += kVectors * kLanes)
    add_block<Acc, Bytes, Rows, kVectors>(factors, y + k, count, features, out + k);
  for (; k + kLanes <= features; k += kLanes) add_block<Acc, Bytes, Rows, 1>(factors, y + k, count, features, out + k);
  for (; k < features; ++k)
    for (int r = 0; r < Rows; ++r)
      for (int64_t m = 0; m < count; ++m) out[r * features + k] += factors[r * kTile + m] * y[m * features + k];
}

// The rows of tile i of out += factor tile y, y the rows of tile j of a matrix. Spoils the tile.
template <typename Acc, int Bytes>
R2F_INLINE void add_product(Acc factor, Tile<Acc>& tile, const Matrix<Acc>& y, int64_t j, int64_t i, int64_t rows,
                            Acc* out) {
  constexpr int kRows = 4;
  const int64_t count = y.tile_rows(j), features = y.features;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t m = 0; m < count; ++m) tile.at[r][m] *= factor;
  Acc* to = out + i * kTile * features;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    add_rows<Acc, Bytes, kRows>(tile.at[r], y.row(j * kTile), count, features, to + r * features);
  for (; r < rows; ++r) add_rows<Acc, Bytes, 1>(tile.at[r], y.row(j * kTile), count, features, to + r * features);
}

template <typename Acc>
R2F_INLINE void transpose(const Tile<Acc>& tile, int64_t rows, int64_t columns, Tile<Acc>& transposed) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) transposed.at[c][r] = tile.at[r][c];
}

// Two matrices and two more; where the latter are the former again, their Gram matrices are symmetric.
template <typename Acc>
struct GramPair {
  Matrix<Acc> of[2], with[2];
  bool symmetric;
};

// The sum of the elements of (a a*^T) o (b b*^T).
template <typename Acc, int Bytes>
R2F_INLINE double gram_sum(const GramPair<Acc>& pair) {
  Tile<Acc> tiles[2];
  double sum = 0;
  for (int64_t i = 0; i < pair.of[0].tiles(); ++i)
    for (int64_t j = pair.symmetric ? i : 0; j < pair.with[0].tiles(); ++j) {
      for (int k = 0; k < 2; ++k) gram_tile<Acc, Bytes>(pair.of[k], i, pair.with[k], j, tiles[k]);
      double of_tile = 0;
      for (int64_t r = 0; r < pair.of[0].tile_rows(i); ++r)
        for (int64_t c = 0; c < pair.with[0].tile_rows(j); ++c)
          of_tile += static_cast<double>(tiles[0].at[r][c]) * static_cast<double>(tiles[1].at[r][c]);
      sum += pair.symmetric && j > i ? 2 * of_tile : of_tile;
    }
  return sum;
}

// The sum of x o y.
template <typename Acc, int Bytes>
R2F_INLINE double inner_product(const Acc* x, const Acc* y, int64_t size) {
  using V = typename VectorOf<double, Bytes>::type;
  constexpr int kLanes = VectorOf<double, Bytes>::kLanes;
  using Narrow = typename VectorOf<Acc, kLanes* static_cast<int>(sizeof(Acc))>::type;
  V sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
      sum[h] += __builtin_convertvector(simd::load<Narrow>(x + i + h * kLanes), V) *
                __builtin_convertvector(simd::load<Narrow>(y + i + h * kLanes), V);
  }
  const V both = sum[0] + sum[1];
  double total = simd::sum_lanes<double, Bytes>(both);
  for (; i < size; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return total;
}

// The matrices of one item.
template <typename Acc>
struct Item {
  Matrix<Acc> x, delta, observed_x, observed_delta;
  const Acc *observed, *product;
  Acc *grad_x, *grad_delta;

  Item(const FactoredLayer& layer, int64_t t) {
    const auto at = [](const void* all, int64_t offset) {
      return all == nullptr ? nullptr : static_cast<const Acc*>(all) + offset;
    };
    const int64_t n = layer.tokens, m = layer.observed_tokens, theirs = layer.observed_is_shared ? 0 : t;
    x = {at(layer.x, t * n * layer.d_in), n, layer.d_in};
    delta = {at(layer.delta, t * n * layer.d_out), n, layer.d_out};
    observed_x = {at(layer.observed_x, theirs * m * layer.d_in), m, layer.d_in};
    observed_delta = {at(layer.observed_delta, theirs * m * layer.d_out), m, layer.d_out};
    observed = at(layer.observed, theirs * layer.d_out * layer.d_in);
    product = at(layer.product, t * n * layer.d_in);
    grad_x = const_cast<Acc*>(at(layer.grad_x, t * n * layer.d_in));
    grad_delta = const_cast<Acc*>(at(layer.grad_delta, t * n * layer.d_out));
  }
};

template <typename Acc>
constexpr double kUnit = delta_unit(sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32);

template <typename Acc, int Bytes>
R2F_INLINE MatchingSums item_sums(const FactoredLayer& layer, int64_t t) {
  const Item<Acc> item(layer, t);
  const double unit = kUnit<Acc>;
  const GramPair<Acc> pairs[3] = {
      {{item.delta, item.x}, {item.delta, item.x}, true},
      {{item.delta, item.x}, {item.observed_delta, item.observed_x}, false},
      {{item.observed_delta, item.observed_x}, {item.observed_delta, item.observed_x}, true}};
  const bool dense = item.observed != nullptr;
  double sums[3] = {};
  for (int k = 0; k < (dense ? 1 : 3); ++k) sums[k] = gram_sum<Acc, Bytes>(pairs[k]) / (unit * unit);
  if (!dense) return factored_sums(sums[1], sums[0], std::max(sums[2], 0.0));
  const double inner = inner_product<Acc, Bytes>(item.product, item.x.data, item.x.rows * item.x.features) / unit;
  const double square = inner_product<Acc, Bytes>(item.observed, item.observed, layer.d_out * layer.d_in);
  return factored_sums(inner, sums[0], square);
}

// out += factor (a b^T) y.
template <typename Acc>
struct GramProduct {
  Acc factor;
  Matrix<Acc> a, b, y;
  Acc* out;
  bool symmetric;  // b is a: each tile above the diagonal serves twice
};

// The tiles are made and used at once.
template <typename Acc, int Bytes>
R2F_INLINE void add_gram_product(const GramProduct<Acc>& job) {
  Tile<Acc> tiles[2];  // a tile and, transposed, its mirror image
  for (int64_t i = 0; i < job.a.tiles(); ++i)
    for (int64_t j = job.symmetric ? i : 0; j < job.b.tiles(); ++j) {
      gram_tile<Acc, Bytes>(job.a, i, job.b, j, tiles[0]);
      const bool twice = job.symmetric && j > i;
      if (twice) transpose(tiles[0], job.a.tile_rows(i), job.b.tile_rows(j), tiles[1]);
      for (int k = 0; k < (twice ? 2 : 1); ++k) {
        const int64_t from = k == 0 ? j : i, to = k == 0 ? i : j;
        add_product<Acc, Bytes>(job.factor, tiles[k], job.y, from, to, job.a.tile_rows(to), job.out);
      }
    }
}

template <typename Acc, int Bytes>
R2F_INLINE void item_backward(const FactoredLayer& layer, int64_t t, const MatchingCoefficients& k) {
  const Item<Acc> item(layer, t);
  const double unit = kUnit<Acc>;
  const int64_t x_size = item.x.rows * layer.d_in, delta_size = item.delta.rows * layer.d_out;
  const auto narrow = [](double v) { return static_cast<Acc>(v); };
  const GramProduct<Acc> jobs[4] = {
      {narrow(k.candidate / (unit * unit)), item.delta, item.delta, item.x, item.grad_x, true},
      {narrow(k.candidate / unit), item.x, item.x, item.delta, item.grad_delta, true},
      {narrow(k.observed / (unit * unit)), item.delta, item.observed_delta, item.observed_x, item.grad_x, false},
      {narrow(k.observed / unit), item.x, item.observed_x, item.observed_delta, item.grad_delta, false}};
  const bool dense = item.observed != nullptr;
  const Acc to_x = narrow(k.observed / unit), to_delta = narrow(k.observed);
  for (int64_t i = 0; i < x_size; ++i) item.grad_x[i] = dense ? to_x * item.product[i] : 0;
  for (int64_t i = 0; i < delta_size; ++i) item.grad_delta[i] = dense ? to_delta * item.grad_delta[i] : 0;
  for (int j = 0; j < (dense ? 2 : 4); ++j) add_gram_product<Acc, Bytes>(jobs[j]);
}

// What is wanted, in one piece: the entries below differ by instruction set only.
struct Wanted {
  MatchingSums* sums;  // null: gradients
  const MatchingCoefficients* coefficients;
};

template <typename Acc, int Bytes>
R2F_INLINE void run_items(const FactoredLayer* layers, int64_t trials, const Wanted& wanted, int64_t first,
                          int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    const FactoredLayer& layer = layers[item / trials];
    if (wanted.sums != nullptr)
      wanted.sums[item] = item_sums<Acc, Bytes>(layer, item % trials);
    else
      item_backward<Acc, Bytes>(layer, item % trials, wanted.coefficients[item]);
  }
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const FactoredLayer* layers, int64_t trials, const Wanted& wanted, int64_t first,
                          int64_t last) {
  if (dtype == DType::kFloat64)
    run_items<double, Bytes>(layers, trials, wanted, first, last);
  else
    run_items<float, Bytes>(layers, trials, wanted, first, last);
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const FactoredLayer* layers, int64_t trials, const Wanted& wanted,
                                  int64_t first, int64_t last) {
  run_dtype<64>(dtype, layers, trials, wanted, first, last);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const FactoredLayer* layers, int64_t trials, const Wanted& wanted,
                              int64_t first, int64_t last) {
  run_dtype<32>(dtype, layers, trials, wanted, first, last);
}
#endif
void run_baseline(DType dtype, const FactoredLayer* layers, int64_t trials, const Wanted& wanted, int64_t first,
                  int64_t last) {
  run_dtype<16>(dtype, layers, trials, wanted, first, last);
}

void run(DType dtype, const FactoredLayer* layers, int64_t trials, const Wanted& wanted, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, layers, trials, wanted, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, layers, trials, wanted, first, last);
#endif
    default: return run_baseline(dtype, layers, trials, wanted, first, last);
  }
}

}  // namespace

void factored_sums_cpu(DType dtype, const FactoredLayer* layers, int64_t trials, int64_t first, int64_t last,
                       MatchingSums* sums) {
  run(dtype, layers, trials, {sums, nullptr}, first, last);
}

void factored_backward_cpu(DType dtype, const FactoredLayer* layers, int64_t trials,
                           const MatchingCoefficients* coefficients, int64_t first, int64_t last) {
  run(dtype, layers, trials, {nullptr, coefficients}, first, last);
}

}  // namespace r2f
