// LoRA-factor gradients on the CPU. See lora_grad.h for what is computed.
//
// Both products are taken in two steps over a tile of tokens, while the tile is in the cache, so x and delta are read
// once from memory:
//   project     U  = X W^T         a dot product over the features for each token and rank      (W = A, or B^T)
//   accumulate  S += U^T X         each token adds its features, times U, to `rank` long rows    (S = grad_B^T, or
//   grad_A)
// Both keep a block of ranks x tokens (or ranks x vectors) in registers, so one load serves many multiply-adds.
#include "kernels/lora_grad.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

// Tokens in a tile: a multiple of every block of tokens below, and few, as rows a multiple of 4 KB apart share 8 places
// in the cache.
constexpr int64_t kTileTokens = 12;
// Features projected at once: 8 rows of W stay in the first-level cache.
constexpr int64_t kChunkBytes = 3072;
// Elements that rows in scratch memory are padded to: whole vectors of any width.
constexpr int64_t kPadding = 64;

// Accumulators kept in registers (of 32 with AVX-512, of 16 otherwise), as `ranks` x `others`.
template <int Bytes>
struct Block {
  static constexpr int kAccumulators = Bytes == 64 ? 24 : 12;
  static constexpr int kMaxRanks = Bytes == 64 ? 8 : 4;
  static constexpr int others(int ranks) { return kAccumulators / ranks < 6 ? kAccumulators / ranks : 6; }
};

// Rows of a matrix, `stride` elements apart.
template <typename Acc>
struct Rows {
  Acc* data;
  int64_t stride;
  R2F_INLINE Acc* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  R2F_INLINE Rows from(int64_t row, int64_t column) const { return {at(row, column), stride}; }
};

// u [Tokens, Ranks] += x w^T over `features` columns (whole vectors).
template <typename Acc, int Bytes, int Ranks, int Tokens>
R2F_INLINE void project_block(Rows<const Acc> x, Rows<const Acc> w, int64_t features, Rows<Acc> u) {
  using V = typename VectorOf<Acc, Bytes>::type;
  V sum[Tokens][Ranks] = {};
  for (int64_t i = 0; i < features; i += VectorOf<Acc, Bytes>::kLanes) {
    V token[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      token[t] = simd::load<V>(x.at(t, i));
      __builtin_prefetch(
          x.at(t + Tokens, i));  // the next tokens: they start in memory pages that the hardware does not foresee
    }
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; ++j) {
      const V row = simd::load<V>(w.at(j, i));
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) sum[t][j] += token[t] * row;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; ++j) *u.at(t, j) += simd::sum_lanes<Acc, Bytes>(sum[t][j]);
  }
}

template <typename Acc, int Bytes, int Ranks>
R2F_INLINE void project_ranks(Rows<const Acc> x, Rows<const Acc> w, int64_t tokens, int64_t features, Rows<Acc> u) {
  constexpr int kTokens = Block<Bytes>::others(Ranks);
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    project_block<Acc, Bytes, Ranks, kTokens>(x.from(t, 0), w, features, u.from(t, 0));
  for (; t < tokens; ++t) project_block<Acc, Bytes, Ranks, 1>(x.from(t, 0), w, features, u.from(t, 0));
}

// u [tokens, rank] = x w^T with x [tokens, features] and w [rank, features]; features are whole vectors.
template <typename Acc, int Bytes>
R2F_INLINE void project(Rows<const Acc> x, Rows<const Acc> w, int64_t tokens, int64_t features, int64_t rank,
                        Rows<Acc> u) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Acc));
  std::fill(u.data, u.at(tokens, 0), Acc(0));
  for (int64_t k = 0; k < features; k += kChunk) {
    const int64_t n = std::min(kChunk, features - k);
    const Rows<const Acc> xk = x.from(0, k), wk = w.from(0, k);
    int64_t j = 0;
    if constexpr (Block<Bytes>::kMaxRanks == 8) {
      for (; j + 8 <= rank; j += 8) project_ranks<Acc, Bytes, 8>(xk, wk.from(j, 0), tokens, n, u.from(0, j));
    }
    for (; j + 4 <= rank; j += 4) project_ranks<Acc, Bytes, 4>(xk, wk.from(j, 0), tokens, n, u.from(0, j));
    for (; j < rank; ++j) project_ranks<Acc, Bytes, 1>(xk, wk.from(j, 0), tokens, n, u.from(0, j));
  }
}

// s [Ranks, Vectors] += u^T x over all tokens of the tile. `ahead`: what will be read two blocks later.
template <typename Acc, int Bytes, int Ranks, int Vectors>
R2F_INLINE void accumulate_block(Rows<const Acc> x, Rows<const Acc> ahead, Rows<const Acc> u, int64_t tokens,
                                 Rows<Acc> s) {
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  V sum[Ranks][Vectors];
#pragma GCC unroll 8
  for (int j = 0; j < Ranks; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < Vectors; ++c) sum[j][c] = simd::load<V>(s.at(j, c * kLanes));
  }
  for (int64_t t = 0; t < tokens; ++t) {
    V token[Vectors];
#pragma GCC unroll 8
    for (int c = 0; c < Vectors; ++c) {
      token[c] = simd::load<V>(x.at(t, c * kLanes));
      __builtin_prefetch(ahead.at(t, c * kLanes));
    }
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; ++j) {
      const Acc factor = *u.at(t, j);
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) sum[j][c] += token[c] * factor;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < Ranks; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < Vectors; ++c) simd::store(s.at(j, c * kLanes), sum[j][c]);
  }
}

template <typename Acc, int Bytes, int Ranks>
R2F_INLINE void accumulate_ranks(Rows<const Acc> x, Rows<const Acc> u, int64_t tokens, int64_t features, Rows<Acc> s) {
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes, kVectors = Block<Bytes>::others(Ranks);
  // After the last columns come the first ones of the next tile, which follows in memory.
  const auto ahead = [&](int64_t i) { return i < features ? x.from(0, i) : x.from(tokens, i - features); };
  int64_t i = 0;
  for (; i + kVectors * kLanes <= features; i += kVectors * kLanes)
    accumulate_block<Acc, Bytes, Ranks, kVectors>(x.from(0, i), ahead(i + 2 * kVectors * kLanes), u, tokens,
                                                  s.from(0, i));
  for (; i < features; i += kLanes)
    accumulate_block<Acc, Bytes, Ranks, 1>(x.from(0, i), ahead(i + 2 * kLanes), u, tokens, s.from(0, i));
}

// s [rank, features] += u^T x with u [tokens, rank] and x [tokens, features]; features are whole vectors.
template <typename Acc, int Bytes>
R2F_INLINE void accumulate(Rows<const Acc> x, Rows<const Acc> u, int64_t tokens, int64_t features, int64_t rank,
                           Rows<Acc> s) {
  int64_t j = 0;
  if constexpr (Block<Bytes>::kMaxRanks == 8) {
    for (; j + 8 <= rank; j += 8) accumulate_ranks<Acc, Bytes, 8>(x, u.from(0, j), tokens, features, s.from(j, 0));
  }
  for (; j + 4 <= rank; j += 4) accumulate_ranks<Acc, Bytes, 4>(x, u.from(0, j), tokens, features, s.from(j, 0));
  for (; j < rank; ++j) accumulate_ranks<Acc, Bytes, 1>(x, u.from(0, j), tokens, features, s.from(j, 0));
}

// Ranks are worked off in blocks of 8, 4 and 1: three of them are cheaper as one block of 4 than as three of 1.
int64_t padded_rank(int64_t rank) { return rank <= 2 ? rank : (rank + 3) / 4 * 4; }

int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// One zeroed, cache-aligned piece of memory, handed out as matrices whose rows are padded to whole vectors.
template <typename Acc>
class Scratch {
 public:
  explicit Scratch(int64_t elements) : memory_(allocate(elements)), next_(memory_.get()) {}

  static int64_t size(int64_t rows, int64_t columns) { return rows * stride(columns); }

  Rows<Acc> take(int64_t rows, int64_t columns) {
    Rows<Acc> matrix{next_, stride(columns)};
    next_ += size(rows, columns);
    return matrix;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(Acc* p) const { ::operator delete[](p, kAlignment); }
  };

  // Never a multiple of 4 KB: rows that far apart compete for the same few places of the first-level cache.
  static int64_t stride(int64_t columns) { return padded(columns) + 16; }

  static std::unique_ptr<Acc[], Free> allocate(int64_t elements) {
    void* memory = ::operator new[](static_cast<size_t>(elements) * sizeof(Acc), kAlignment);
    std::fill_n(static_cast<Acc*>(memory), elements, Acc(0));
    return std::unique_ptr<Acc[], Free>(static_cast<Acc*>(memory));
  }

  std::unique_ptr<Acc[], Free> memory_;
  Acc* next_;
};

template <typename T>
R2F_INLINE void copy(const T* from, int64_t rows, int64_t columns, Rows<Accumulation<T>> to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < columns; ++k) *to.at(i, k) = widen(from[i * columns + k]);
}

template <typename T>
R2F_INLINE void copy_transposed(const T* from, int64_t rows, int64_t columns, Rows<Accumulation<T>> to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < columns; ++k) *to.at(k, i) = widen(from[i * columns + k]);
}

// Whether rows can be read in place, as whole vectors of the type that is summed.
template <typename T, int Bytes>
R2F_INLINE bool reads_directly(int64_t features) {
  return std::is_same_v<T, Accumulation<T>> && features % VectorOf<Accumulation<T>, Bytes>::kLanes == 0;
}

// The tile itself if it can be read in place; else a widened copy in `room`, padded with zeros.
template <typename T, int Bytes>
R2F_INLINE Rows<const Accumulation<T>> readable(const T* tile, int64_t tokens, int64_t features,
                                                Rows<Accumulation<T>> room) {
  if constexpr (std::is_same_v<T, Accumulation<T>>) {
    if (reads_directly<T, Bytes>(features)) return {tile, features};
  }
  copy(tile, tokens, features, room);
  return {room.data, room.stride};
}

// The results of one group: grad = scale * sum and, if a step is wanted, stepped = factor - lr * grad.
template <typename T>
struct Result {
  using Acc = Accumulation<T>;
  Acc scale, lr;
  const T* factor;  // null: zero
  Acc* grad;
  Acc* stepped;  // null: no step

  R2F_INLINE void write(int64_t index, Acc sum) const {
    const Acc g = scale * sum;
    grad[index] = g;
    if (stepped != nullptr) stepped[index] = (factor == nullptr ? Acc(0) : Acc(widen(factor[index]))) - lr * g;
  }

  template <typename V>
  R2F_INLINE void write_vector(int64_t index, V sum) const {
    constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(Acc));
    const V g = sum * scale;
    simd::store(grad + index, g);
    if (stepped == nullptr) return;
    V from{};
    if (factor != nullptr)
      for (int i = 0; i < kLanes; ++i) from[i] = widen(factor[index + i]);
    const V after = from - g * lr;
    simd::store(stepped + index, after);
  }
};

// sum [ranks, features], written as [features, ranks]: in squares of 4 x 4, or this would cost as much as the sums of a
// short group.
template <typename T>
R2F_INLINE void write_transposed(Rows<const Accumulation<T>> sum, int64_t ranks, int64_t features,
                                 const Result<T>& result) {
  using Acc = Accumulation<T>;
  using V = typename VectorOf<Acc, 4 * sizeof(Acc)>::type;
  const int64_t whole_ranks = ranks / 4 * 4, whole_features = features / 4 * 4;
  for (int64_t j = 0; j < whole_ranks; j += 4) {
    for (int64_t o = 0; o < whole_features; o += 4) {
      const V a = simd::load<V>(sum.at(j, o)), b = simd::load<V>(sum.at(j + 1, o));
      const V c = simd::load<V>(sum.at(j + 2, o)), d = simd::load<V>(sum.at(j + 3, o));
      const V ab = {a[0], b[0], a[1], b[1]}, cd = {c[0], d[0], c[1], d[1]};
      const V ab2 = {a[2], b[2], a[3], b[3]}, cd2 = {c[2], d[2], c[3], d[3]};
      const int64_t index = o * ranks + j;
      result.write_vector(index, V{ab[0], ab[1], cd[0], cd[1]});
      result.write_vector(index + ranks, V{ab[2], ab[3], cd[2], cd[3]});
      result.write_vector(index + 2 * ranks, V{ab2[0], ab2[1], cd2[0], cd2[1]});
      result.write_vector(index + 3 * ranks, V{ab2[2], ab2[3], cd2[2], cd2[3]});
    }
  }
  for (int64_t o = 0; o < features; ++o)
    for (int64_t j = o < whole_features ? whole_ranks : 0; j < ranks; ++j) result.write(o * ranks + j, *sum.at(j, o));
}

template <typename T, int Bytes>
R2F_INLINE void run_groups(const LoraGradArgs& args, int64_t first, int64_t last) {
  using Acc = Accumulation<T>;
  using S = Scratch<Acc>;
  const int64_t d_in = args.d_in, d_out = args.d_out;
  const int64_t ranks = args.rank, rank = padded_rank(ranks);  // the rows beyond `ranks` are zero
  constexpr int64_t kLanes = VectorOf<Acc, Bytes>::kLanes;
  const int64_t in_vectors = (d_in + kLanes - 1) / kLanes * kLanes,
                out_vectors = (d_out + kLanes - 1) / kLanes * kLanes;
  const bool with_B = args.B != nullptr;
  const Acc scale = static_cast<Acc>(args.scale), lr = static_cast<Acc>(args.lr);

  const int64_t x_rows = reads_directly<T, Bytes>(d_in) ? 0 : kTileTokens;
  const int64_t delta_rows = reads_directly<T, Bytes>(d_out) ? 0 : kTileTokens;
  const int64_t half = S::size(rank + x_rows, d_in) + S::size(rank + delta_rows, d_out) + S::size(kTileTokens, rank);
  S scratch(with_B ? half + S::size(rank, d_in) + S::size(rank, d_out) + S::size(kTileTokens, rank) : half);
  const Rows<Acc> A_rows = scratch.take(rank, d_in), sum_B = scratch.take(rank, d_out),
                  u = scratch.take(kTileTokens, rank);
  const Rows<Acc> x_room = scratch.take(x_rows, d_in), delta_room = scratch.take(delta_rows, d_out);
  Rows<Acc> B_rows{}, sum_A{}, v{};
  if (with_B) B_rows = scratch.take(rank, d_out), sum_A = scratch.take(rank, d_in), v = scratch.take(kTileTokens, rank);
  const auto read = [](const Rows<Acc>& m) { return Rows<const Acc>{m.data, m.stride}; };

  for (int64_t p = first; p < last; ++p) {
    const T* A = static_cast<const T*>(args.A) + (args.A_per_group ? p * ranks * d_in : 0);
    const T* B = with_B ? static_cast<const T*>(args.B) + (args.B_per_group ? p * d_out * ranks : 0) : nullptr;
    if (p == first || args.A_per_group) copy(A, ranks, d_in, A_rows);
    if (with_B && (p == first || args.B_per_group)) copy_transposed(B, d_out, ranks, B_rows);
    std::fill(sum_B.data, sum_B.at(rank, 0), Acc(0));
    if (with_B) std::fill(sum_A.data, sum_A.at(rank, 0), Acc(0));

    const int64_t end = args.first_row(p + 1);
    for (int64_t t = args.first_row(p); t < end; t += kTileTokens) {
      const int64_t count = std::min(kTileTokens, end - t);
      const auto x = readable<T, Bytes>(static_cast<const T*>(args.x) + t * d_in, count, d_in, x_room);
      const auto delta = readable<T, Bytes>(static_cast<const T*>(args.delta) + t * d_out, count, d_out, delta_room);
      project<Acc, Bytes>(x, read(A_rows), count, in_vectors, rank, u);
      if (with_B) {
        project<Acc, Bytes>(delta, read(B_rows), count, out_vectors, rank, v);
        accumulate<Acc, Bytes>(x, read(v), count, in_vectors, rank, sum_A);
      }
      accumulate<Acc, Bytes>(delta, read(u), count, out_vectors, rank, sum_B);
    }

    const auto part = [p](void* all, int64_t size) {
      return all == nullptr ? nullptr : static_cast<Acc*>(all) + p * size;
    };
    const Result<T> to_B{scale, lr, B, part(args.grad_B, d_out * ranks), part(args.B1, d_out * ranks)};
    write_transposed<T>(read(sum_B), ranks, d_out, to_B);
    if (with_B) {
      const Result<T> to_A{scale, lr, A, part(args.grad_A, ranks * d_in), part(args.A1, ranks * d_in)};
      for (int64_t j = 0; j < ranks; ++j)
        for (int64_t i = 0; i < d_in; ++i) to_A.write(j * d_in + i, *sum_A.at(j, i));
    }
  }
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return run_groups<float, Bytes>(args, first, last);
    case DType::kFloat64: return run_groups<double, Bytes>(args, first, last);
    case DType::kBFloat16: return run_groups<BFloat16, Bytes>(args, first, last);
  }
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last) {
  run_dtype<64>(dtype, args, first, last);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last) {
  run_dtype<32>(dtype, args, first, last);
}
#endif
void run_baseline(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last) {
  run_dtype<16>(dtype, args, first, last);
}

}  // namespace

void lora_grad_cpu(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, args, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, args, first, last);
#endif
    default: return run_baseline(dtype, args, first, last);
  }
}

}  // namespace r2f
