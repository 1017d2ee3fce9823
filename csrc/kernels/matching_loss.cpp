// Distances between lists of gradients on the CPU. See matching_loss.h for what is computed.
//
// Forward and backward are one pass over candidate and observed each, piece by piece, or one together. Of float32 and
// bfloat16, blocks of kBlock elements are summed in float32, and the blocks' sums in float64; a block whose sums leave
// the range in which that loses nothing but roundings (gradients below 1e-13 or beyond 1e16, blocks of zeros) is summed
// again in float64.
#include "kernels/matching_loss.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

constexpr int64_t kBlock = 1024;                // elements
constexpr int64_t kTogether = 1 << 17;          // elements of a layer that a core's cache holds with the observed ones
constexpr int64_t kCaches = 8 << 20;            // bytes of gradients that caches may hold until they are read
constexpr double kLeast = 1e-24, kMost = 1e36;  // a block's sums of squares in float32
constexpr double kLeastFactor = 1e-30, kMostFactor = 1e30;

template <typename T, int Lanes>
using Elements = typename VectorOf<T, Lanes* static_cast<int>(sizeof(T))>::type;

// Some neighbouring elements as Acc, which is no narrower than they are.
template <typename Acc, int Lanes, typename T>
R2F_INLINE Elements<Acc, Lanes> load_as(const T* p) {
  if constexpr (std::is_same_v<T, Acc>)
    return simd::load<Elements<Acc, Lanes>>(p);
  else if constexpr (std::is_same_v<Acc, float>)
    return simd::load_wide<Elements<float, Lanes>>(p);
  else
    return __builtin_convertvector(load_as<float, Lanes>(p), Elements<double, Lanes>);
}

template <typename T, typename Acc, int Bytes>
R2F_INLINE MatchingSums block_sums(const T* c, const T* o, int64_t size) {
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes, kRows = 2;  // two of each sum hide the adds' latency
  using V = Elements<Acc, kLanes>;
  V inner[kRows] = {}, candidate[kRows] = {}, observed[kRows] = {}, difference[kRows] = {};
  int64_t i = 0;
  for (; i + kRows * kLanes <= size; i += kRows * kLanes) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(c + i + r * kLanes + 2 * kBlock);  // the hardware stops at the end of each page
      const V a = load_as<Acc, kLanes>(c + i + r * kLanes), b = load_as<Acc, kLanes>(o + i + r * kLanes), d = a - b;
      inner[r] += a * b;
      candidate[r] += a * a;
      observed[r] += b * b;
      difference[r] += d * d;
    }
  }
  const V rows[4] = {inner[0] + inner[1], candidate[0] + candidate[1], observed[0] + observed[1],
                     difference[0] + difference[1]};
  Acc total[kLanes > 4 ? kLanes : 4];
  simd::sum_lanes<Acc, Bytes, 4>(rows, total);
  MatchingSums sums{total[0], total[1], total[2], total[3]};
  for (; i < size; ++i) {
    const double a = widen(c[i]), b = widen(o[i]);
    sums.add(1, {a * b, a * a, b * b, (a - b) * (a - b)});
  }
  return sums;
}

// False for NaN too.
R2F_INLINE bool float32_was_enough(const MatchingSums& sums) {
  const auto fits = [](double square) __attribute__((always_inline)) { return square >= kLeast && square <= kMost; };
  return fits(sums.candidate) && fits(sums.observed) && fits(sums.difference);
}

// Block by block; after_block(first element, elements) may use what is now in the first-level cache.
template <typename T, int Bytes, typename AfterBlock>
R2F_INLINE MatchingSums sums_of(const T* c, const T* o, int64_t size, const AfterBlock& after_block) {
  using Acc = Accumulation<T>;
  MatchingSums total;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t count = std::min(kBlock, size - i);
    MatchingSums sums = block_sums<T, Acc, Bytes>(c + i, o + i, count);
    if constexpr (!std::is_same_v<T, double>)
      if (!float32_was_enough(sums)) sums = block_sums<T, double, Bytes>(c + i, o + i, count);
    total.add(1, sums);
    after_block(i, count);
  }
  return total;
}

enum class Into { kCaches, kMemory, kSum };  // kMemory: past the caches; kSum: added to what is there

// result = p x + q y; products and sums in Acc.
template <typename T, typename Acc, int Bytes, Into Where>
R2F_INLINE void combine_as(Acc p, const T* x, Acc q, const T* y, Accumulation<T>* result, int64_t size) {
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  using Results = Elements<Accumulation<T>, kLanes>;
  const auto one = [&](int64_t i) __attribute__((always_inline)) {
    const Acc sum = static_cast<Acc>(widen(x[i])) * p + static_cast<Acc>(widen(y[i])) * q;
    result[i] = static_cast<Accumulation<T>>(Where == Into::kSum ? result[i] + sum : sum);
  };
  int64_t i = 0;
  if constexpr (Where == Into::kMemory)
    for (; i < size && !simd::is_aligned<Results>(result + i); ++i) one(i);
  for (; i + kLanes <= size; i += kLanes) {
    Elements<Acc, kLanes> sum = load_as<Acc, kLanes>(x + i) * p + load_as<Acc, kLanes>(y + i) * q;
    if constexpr (Where == Into::kSum) sum += load_as<Acc, kLanes>(result + i);
    const Results narrow = __builtin_convertvector(sum, Results);
    if constexpr (Where == Into::kMemory)
      simd::store_past_caches(result + i, narrow);
    else
      simd::store(result + i, narrow);
  }
  for (; i < size; ++i) one(i);
}

template <typename T, int Bytes, Into Where>
R2F_INLINE void combine(double p, const T* x, double q, const T* y, Accumulation<T>* result, int64_t size) {
  const auto fits = [](double factor) __attribute__((always_inline)) {
    const double size = std::fabs(factor);
    return factor == 0 || (size >= kLeastFactor && size <= kMostFactor);
  };
  if constexpr (std::is_same_v<T, double>)
    combine_as<T, double, Bytes, Where>(p, x, q, y, result, size);
  else if (!fits(p) || !fits(q))  // float32 may not hold them
    combine_as<T, double, Bytes, Where == Into::kSum ? Into::kSum : Into::kCaches>(p, x, q, y, result, size);
  else
    combine_as<T, Accumulation<T>, Bytes, Where>(static_cast<Accumulation<T>>(p), x, static_cast<Accumulation<T>>(q), y,
                                                 result, size);
}

// Calls work(piece, layer number, its first element, elements) for the pieces first <= piece < last.
template <typename Work>
R2F_INLINE void for_pieces(const MatchingArgs& args, int64_t first, int64_t last, const Work& work) {
  int64_t before = 0;  // pieces of the layers before
  for (int64_t l = 0; l < args.count && before < last; ++l) {
    const int64_t size = args.layers[l].size, pieces = matching_pieces(args.layers[l]);
    for (int64_t piece = std::max(first, before); piece < std::min(last, before + pieces); ++piece) {
      const int64_t begin = (piece - before) * kMatchingPiece;
      work(piece, l, begin, std::min(kMatchingPiece, size - begin));
    }
    before += pieces;
  }
}

// A piece of a layer's trial.
template <typename T>
struct Piece {
  const MatchingLayer& layer;
  int64_t own, theirs;  // where it starts in the candidate, in the observed

  R2F_INLINE Piece(const MatchingLayer& of, int64_t t, int64_t begin)
      : layer(of), own(t * of.size + begin), theirs(of.observed_is_shared ? begin : own) {}
  R2F_INLINE const T* candidate() const { return static_cast<const T*>(layer.candidate) + own; }
  R2F_INLINE const T* observed() const { return static_cast<const T*>(layer.observed) + theirs; }
  R2F_INLINE Accumulation<T>* grad_candidate() const {
    return static_cast<Accumulation<T>*>(layer.grad_candidate) + own;
  }
  R2F_INLINE Accumulation<T>* grad_observed() const {
    return static_cast<Accumulation<T>*>(layer.grad_observed) + theirs;
  }
};

template <typename T, int Bytes, Into Where>
R2F_INLINE void backward_pieces(const MatchingArgs& args, const MatchingCoefficients* coefficients, int64_t first,
                                int64_t last) {
  for_pieces(args, first, last, [&](int64_t, int64_t l, int64_t begin, int64_t size) __attribute__((always_inline)) {
    const MatchingLayer& layer = args.layers[l];
    for (int64_t t = 0; t < args.trials; ++t) {
      const MatchingCoefficients& k = coefficients[l * args.trials + t];
      const Piece<T> at(layer, t, begin);
      const T *c = at.candidate(), *o = at.observed();
      combine<T, Bytes, Where>(k.observed, o, k.candidate, c, at.grad_candidate(), size);
      if (layer.grad_observed == nullptr) continue;
      if (layer.observed_is_shared && t > 0)
        combine<T, Bytes, Into::kSum>(k.observed, c, k.itself, o, at.grad_observed(), size);
      else
        combine<T, Bytes, Into::kCaches>(k.observed, c, k.itself, o, at.grad_observed(), size);
    }
  });
}

// The sums and, if wanted, the candidate's gradients of the layers that matching_together() holds of. With kL2 block by
// block; with kLayerCosine the coefficients need all sums of the layer: whoever has its first piece works off all of
// it. One function for both, so that the sums have the same bits with gradients and without.
template <typename T, int Bytes, Into Where>
R2F_INLINE void sum_pieces(const MatchingArgs& args, bool with_gradients, int64_t first, int64_t last,
                           MatchingSums* of_pieces) {
  for_pieces(
      args, first, last, [&](int64_t piece, int64_t l, int64_t begin, int64_t size) __attribute__((always_inline)) {
        const MatchingLayer& layer = args.layers[l];
        const bool together = with_gradients && matching_together(args.kind, layer);
        const bool all = together && args.kind != MatchingKind::kL2;
        if (all && begin > 0) return;
        if (all) size = layer.size;
        const MatchingCoefficients at_once = matching_coefficients(MatchingKind::kL2, args.weights[l], 1, {}, {});
        for (int64_t t = 0; t < args.trials; ++t) {
          const Piece<T> at(layer, t, begin);
          MatchingSums total;
          for (int64_t p = 0; p * kMatchingPiece < size; ++p) {
            const int64_t start = p * kMatchingPiece, count = std::min(kMatchingPiece, size - start);
            MatchingSums& sums = of_pieces[(piece + p) * args.trials + t];
            const T *c = at.candidate() + start, *o = at.observed() + start;
            sums = sums_of<T, Bytes>(c, o, count, [&](int64_t i, int64_t elements) __attribute__((always_inline)) {
              if (together && !all)
                combine<T, Bytes, Where>(at_once.observed, o + i, at_once.candidate, c + i,
                                         at.grad_candidate() + start + i, elements);
            });
            total.add(1, sums);
          }
          if (!all) continue;
          const MatchingCoefficients k = matching_coefficients(args.kind, args.weights[l], 1, total, total);
          combine<T, Bytes, Where>(k.observed, at.observed(), k.candidate, at.candidate(), at.grad_candidate(), size);
        }
      });
}

// What is wanted, in one piece: the entries below differ by instruction set only.
struct Wanted {
  MatchingSums* of_pieces;                   // null: no sums but
  const MatchingCoefficients* coefficients;  // the gradients by these
  bool with_gradients;                       // those that the sums just made allow
};

// Gradients that no cache will hold until they are read go past the caches: a store into a line that is not there reads
// it first.
bool beyond_caches(DType dtype, const MatchingArgs& args) {
  int64_t numbers = 0;
  for (int64_t l = 0; l < args.count; ++l) numbers += args.trials * args.layers[l].size;
  return numbers * (dtype == DType::kFloat64 ? 8 : 4) > kCaches;
}

template <typename T, int Bytes, Into Where>
R2F_INLINE void run_pieces(const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  if (wanted.of_pieces != nullptr)
    sum_pieces<T, Bytes, Where>(args, wanted.with_gradients, first, last, wanted.of_pieces);
  else
    backward_pieces<T, Bytes, Where>(args, wanted.coefficients, first, last);
}

template <typename T, int Bytes>
R2F_INLINE void run_where(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  if (!beyond_caches(dtype, args)) return run_pieces<T, Bytes, Into::kCaches>(args, wanted, first, last);
  run_pieces<T, Bytes, Into::kMemory>(args, wanted, first, last);
  simd::finish_stores_past_caches();
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return run_where<float, Bytes>(dtype, args, wanted, first, last);
    case DType::kFloat64: return run_where<double, Bytes>(dtype, args, wanted, first, last);
    case DType::kBFloat16: return run_where<BFloat16, Bytes>(dtype, args, wanted, first, last);
  }
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first,
                                  int64_t last) {
  run_dtype<64>(dtype, args, wanted, first, last);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first,
                              int64_t last) {
  run_dtype<32>(dtype, args, wanted, first, last);
}
#endif
void run_baseline(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  run_dtype<16>(dtype, args, wanted, first, last);
}

void run(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, args, wanted, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, args, wanted, first, last);
#endif
    default: return run_baseline(dtype, args, wanted, first, last);
  }
}

}  // namespace

bool matching_together(MatchingKind kind, const MatchingLayer& layer) {
  return kind == MatchingKind::kL2 || (kind == MatchingKind::kLayerCosine && layer.size <= kTogether);
}

void matching_piece_sums_cpu(DType dtype, const MatchingArgs& args, bool with_gradients, int64_t first, int64_t last,
                             MatchingSums* of_pieces) {
  run(dtype, args, {of_pieces, nullptr, with_gradients}, first, last);
}

void matching_finish_cpu(const MatchingArgs& args, const MatchingSums* of_pieces, MatchingSums* sums, double* losses) {
  int64_t piece = 0;
  for (int64_t l = 0; l < args.count; ++l) {
    MatchingSums* of_layer = sums + l * args.trials;
    std::fill_n(of_layer, args.trials, MatchingSums{});
    for (const int64_t last = piece + matching_pieces(args.layers[l]); piece < last; ++piece)
      for (int64_t t = 0; t < args.trials; ++t) of_layer[t].add(1, of_pieces[piece * args.trials + t]);
  }
  matching_losses(args.kind, args.weights, args.count, args.trials, sums, losses);
}

void matching_loss_backward_cpu(DType dtype, const MatchingArgs& args, const MatchingCoefficients* coefficients,
                                int64_t first, int64_t last) {
  run(dtype, args, {nullptr, coefficients, false}, first, last);
}

}  // namespace r2f
