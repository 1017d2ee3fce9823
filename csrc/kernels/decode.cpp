// Decoders on the CPU. See decode.h for what is computed.
//
// A small batch is bound by the weights that it reads: each comes from memory once and serves the whole batch. Sums run
// in an order that does not depend on the batch or on who takes an item.
#include "kernels/decode.h"

#include <algorithm>
#include <cmath>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

constexpr int64_t kItemRows = 8;      // of a map
constexpr int64_t kSumBytes = 16384;  // of a head: sums of all samples that wait in the first-level cache
constexpr int kMostSamples = 8;       // that are summed at once

int64_t head_columns(DType dtype, int64_t batch) {
  const int64_t bytes = dtype == DType::kFloat64 ? 8 : 4;
  return kSumBytes / bytes / (batch >= 8 ? 8 : batch >= 4 ? 4 : batch >= 2 ? 2 : 1);
}

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
int64_t items_of(DType, const DecodeMap& map, int64_t) { return pieces(map.rows, kItemRows); }
int64_t items_of(DType dtype, const DecodeHead& head, int64_t batch) {
  return pieces(head.size, head_columns(dtype, batch));
}
int64_t items_of(DType, const DecodeNorm&, int64_t) { return 1; }

template <typename Part>
int64_t count_items(DType dtype, const DecodeStage<Part>& stage) {
  int64_t items = 0;
  for (int64_t p = 0; p < stage.count; ++p) items += items_of(dtype, stage.parts[p], stage.batch);
  return items;
}

// Columns that are taken at once: the inputs of eight samples stay in the first-level cache while an item's rows go by;
// those of fewer mostly do so anyway.
template <typename Acc, int Samples>
constexpr int64_t kChunk = Samples < kMostSamples ? INT64_MAX : kSumBytes / static_cast<int64_t>(sizeof(Acc)) / Samples;

// sums [Rows][Samples] += the products of Rows rows of a map with Samples inputs, both from their first column of the
// chunk on. `ahead`: the weights to come, as far apart.
template <typename T, int Bytes, int Rows, int Samples, typename V>
R2F_INLINE void add_products(const T* weight, const Accumulation<T>* in, int64_t columns, int64_t chunk, const T* ahead,
                             V (*sums)[Samples]) {
  constexpr int kLanes = VectorOf<Accumulation<T>, Bytes>::kLanes;
  V sum[Rows][Samples];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < Samples; ++s) sum[r][s] = sums[r][s];
  for (int64_t k = 0; k + kLanes <= chunk; k += kLanes) {
    V w[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      w[r] = simd::load_wide<V>(weight + r * columns + k);
      __builtin_prefetch(ahead + r * columns + k);
    }
#pragma GCC unroll 8
    for (int s = 0; s < Samples; ++s) {
      const V h = simd::load<V>(in + s * columns + k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r][s] += w[r] * h;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < Samples; ++s) sums[r][s] = sum[r][s];
}

template <typename Acc>
R2F_INLINE Acc at_or_one(const void* values, int64_t index) {
  return values == nullptr ? Acc(1) : static_cast<const Acc*>(values)[index];
}

// What becomes of a row's product with a sample.
template <typename T>
R2F_INLINE void finish_row(const DecodeMap& map, int64_t row, int64_t sample, Accumulation<T> sum) {
  using Acc = Accumulation<T>;
  const Acc norm = at_or_one<Acc>(map.divisor, sample), factor = at_or_one<Acc>(map.factor, sample);
  const Acc one_over = norm == 0 ? Acc(0) : 1 / norm;
  const Acc bias = map.bias == nullptr ? Acc(0) : widen(static_cast<const T*>(map.bias)[row]);
  const Acc v = (map.divisor == nullptr ? sum : sum * one_over) + bias;
  const int64_t at = sample * map.rows + row;
  if (map.before != nullptr) static_cast<Acc*>(map.before)[at] = v;
  static_cast<Acc*>(map.out)[at] = v * factor;
}

// Rows row <= r < end, at most kItemRows, of samples first .. first + Samples - 1.
template <typename T, int Bytes, int Samples>
R2F_INLINE void map_rows(const DecodeMap& map, int64_t row, int64_t end, int64_t first) {
  using Acc = Accumulation<T>;
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  // With AVX-512 there are 32 registers, else 16.
  constexpr int kRows = Bytes == 64 ? (Samples <= 4 ? 4 : 2) : (Samples <= 2 ? 4 : Samples == 4 ? 2 : 1);
  const T* weight = static_cast<const T*>(map.weight) + row * map.columns;
  const Acc* in = static_cast<const Acc*>(map.in) + first * map.columns;
  const int64_t rows = end - row, whole = map.columns / kLanes * kLanes;
  V sums[kItemRows][Samples] = {};
  for (int64_t k = 0, chunk; k < whole; k += chunk) {
    chunk = std::min(kChunk<Acc, Samples>, whole - k);
    // What comes next: the rows' next chunk, or the next rows.
    const T* here = weight + k;
    const T* ahead = k + chunk < whole ? here + chunk : weight + (k > 0 ? rows : kRows) * map.columns;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
      add_products<T, Bytes, kRows, Samples>(here + r * map.columns, in + k, map.columns, chunk,
                                             ahead + r * map.columns, sums + r);
    if constexpr (kRows > 1)
      for (; r < rows; ++r)
        add_products<T, Bytes, 1, Samples>(here + r * map.columns, in + k, map.columns, chunk, ahead + r * map.columns,
                                           sums + r);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int s = 0; s < Samples; ++s) {
      Acc total = simd::sum_lanes<Acc, Bytes>(sums[r][s]);
      for (int64_t k = whole; k < map.columns; ++k)
        total += widen(weight[r * map.columns + k]) * in[s * map.columns + k];
      finish_row<T>(map, row + r, first + s, total);
    }
}

template <typename T, int Bytes>
R2F_INLINE void map_item(const DecodeMap& map, int64_t batch, int64_t item) {
  const int64_t row = item * kItemRows, end = std::min(row + kItemRows, map.rows);
  int64_t s = 0;
  for (; s + 8 <= batch; s += 8) map_rows<T, Bytes, 8>(map, row, end, s);
  for (; s + 4 <= batch; s += 4) map_rows<T, Bytes, 4>(map, row, end, s);
  for (; s + 2 <= batch; s += 2) map_rows<T, Bytes, 2>(map, row, end, s);
  for (; s < batch; ++s) map_rows<T, Bytes, 1>(map, row, end, s);
}

// sums [Samples, width] += coefficients [Samples, Rows] basis [Rows, width].
template <typename T, int Bytes, int Rows, int Samples>
R2F_INLINE void add_rows(const T* basis, int64_t stride, const Accumulation<T>* coefficients, int64_t rank,
                         int64_t width, Accumulation<T>* sums) {
  using Acc = Accumulation<T>;
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    V row[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      row[r] = simd::load_wide<V>(basis + r * stride + k);
      // The rows that come next. With fewer samples the hardware keeps up on its own.
      if constexpr (Samples == kMostSamples) __builtin_prefetch(basis + (Rows + r) * stride + k);
    }
#pragma GCC unroll 8
    for (int s = 0; s < Samples; ++s) {
      V sum = simd::load<V>(sums + s * width + k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum += row[r] * coefficients[s * rank + r];
      simd::store(sums + s * width + k, sum);
    }
  }
  for (; k < width; ++k)
    for (int s = 0; s < Samples; ++s)
      for (int r = 0; r < Rows; ++r) sums[s * width + k] += widen(basis[r * stride + k]) * coefficients[s * rank + r];
}

template <typename T, int Bytes, int Samples>
R2F_INLINE void head_block(const DecodeHead& head, int64_t column, int64_t width, int64_t first) {
  using Acc = Accumulation<T>;
  constexpr int kRows = Bytes == 64 ? 8 : 4;
  alignas(64) Acc sums[kSumBytes / sizeof(Acc)];
  std::fill(sums, sums + Samples * width, Acc(0));
  const T* basis = static_cast<const T*>(head.basis) + column;
  const Acc* c = static_cast<const Acc*>(head.coefficients) + first * head.rank;
  int64_t r = 0;
  for (; r + kRows <= head.rank; r += kRows)
    add_rows<T, Bytes, kRows, Samples>(basis + r * head.stride, head.stride, c + r, head.rank, width, sums);
  for (; r < head.rank; ++r)
    add_rows<T, Bytes, 1, Samples>(basis + r * head.stride, head.stride, c + r, head.rank, width, sums);
  for (int s = 0; s < Samples; ++s)
    std::copy(sums + s * width, sums + (s + 1) * width, static_cast<Acc*>(head.out) + (first + s) * head.size + column);
}

template <typename T, int Bytes>
R2F_INLINE void head_item(DType dtype, const DecodeHead& head, int64_t batch, int64_t item) {
  const int64_t piece = head_columns(dtype, batch), column = item * piece, width = std::min(piece, head.size - column);
  int64_t s = 0;
  for (; s + 8 <= batch; s += 8) head_block<T, Bytes, 8>(head, column, width, s);
  for (; s + 4 <= batch; s += 4) head_block<T, Bytes, 4>(head, column, width, s);
  for (; s + 2 <= batch; s += 2) head_block<T, Bytes, 2>(head, column, width, s);
  for (; s < batch; ++s) head_block<T, Bytes, 1>(head, column, width, s);
}

// In float64: squares of small numbers would underflow.
template <typename Acc, int Bytes>
R2F_INLINE void norm_item(const DecodeNorm& norm, int64_t batch) {
  using V = typename VectorOf<double, Bytes>::type;
  constexpr int kLanes = VectorOf<double, Bytes>::kLanes;
  using Narrow = typename VectorOf<Acc, kLanes* static_cast<int>(sizeof(Acc))>::type;
  for (int64_t s = 0; s < batch; ++s) {
    const Acc* row = static_cast<const Acc*>(norm.in) + s * norm.columns;
    V sum = {};
    int64_t k = 0;
    for (; k + kLanes <= norm.columns; k += kLanes) {
      const V v = __builtin_convertvector(simd::load<Narrow>(row + k), V);
      sum += v * v;
    }
    double total = simd::sum_lanes<double, Bytes>(sum);
    for (; k < norm.columns; ++k) total += static_cast<double>(row[k]) * static_cast<double>(row[k]);
    static_cast<Acc*>(norm.norms)[s] = static_cast<Acc>(std::sqrt(total));
  }
}

template <typename T, int Bytes>
R2F_INLINE void run_item(DType, const DecodeMap& map, int64_t batch, int64_t item) {
  map_item<T, Bytes>(map, batch, item);
}
template <typename T, int Bytes>
R2F_INLINE void run_item(DType dtype, const DecodeHead& head, int64_t batch, int64_t item) {
  head_item<T, Bytes>(dtype, head, batch, item);
}
template <typename T, int Bytes>
R2F_INLINE void run_item(DType, const DecodeNorm& norm, int64_t batch, int64_t) {
  norm_item<Accumulation<T>, Bytes>(norm, batch);
}

template <typename T, int Bytes, typename Part>
R2F_INLINE void run_items(DType dtype, const DecodeStage<Part>& stage, int64_t first, int64_t last) {
  int64_t begin = 0;  // of this part's items
  for (int64_t p = 0; p < stage.count && begin < last; ++p) {
    const int64_t end = begin + items_of(dtype, stage.parts[p], stage.batch);
    for (int64_t item = std::max(begin, first); item < std::min(end, last); ++item)
      run_item<T, Bytes>(dtype, stage.parts[p], stage.batch, item - begin);
    begin = end;
  }
}

template <int Bytes, typename Part>
R2F_INLINE void run_dtype(DType dtype, const DecodeStage<Part>& stage, int64_t first, int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return run_items<float, Bytes>(dtype, stage, first, last);
    case DType::kFloat64: return run_items<double, Bytes>(dtype, stage, first, last);
    case DType::kBFloat16: return run_items<BFloat16, Bytes>(dtype, stage, first, last);
  }
}

#define R2F_ENTRY(name, target, Bytes)                                                         \
  template <typename Part>                                                                     \
  target void name(DType dtype, const DecodeStage<Part>& stage, int64_t first, int64_t last) { \
    run_dtype<Bytes>(dtype, stage, first, last);                                               \
  }
#ifdef R2F_X86_DISPATCH
R2F_ENTRY(run_avx512, R2F_TARGET_AVX512, 64)
R2F_ENTRY(run_avx2, R2F_TARGET_AVX2, 32)
#endif
R2F_ENTRY(run_baseline, , 16)
#undef R2F_ENTRY

template <typename Part>
void run(DType dtype, const DecodeStage<Part>& stage, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, stage, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, stage, first, last);
#endif
    default: return run_baseline(dtype, stage, first, last);
  }
}

}  // namespace

int64_t decode_items(const DecodeStage<DecodeMap>& stage) { return count_items(DType::kFloat32, stage); }
int64_t decode_items(DType dtype, const DecodeStage<DecodeHead>& stage) { return count_items(dtype, stage); }

void decode_maps_cpu(DType dtype, const DecodeStage<DecodeMap>& stage, int64_t first, int64_t last) {
  run(dtype, stage, first, last);
}
void decode_heads_cpu(DType dtype, const DecodeStage<DecodeHead>& stage, int64_t first, int64_t last) {
  run(dtype, stage, first, last);
}
void decode_norms_cpu(DType dtype, const DecodeStage<DecodeNorm>& stage, int64_t first, int64_t last) {
  run(dtype, stage, first, last);
}

}  // namespace r2f
