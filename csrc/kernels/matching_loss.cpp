// Distances between lists of gradients on the CPU. See matching_loss.h for the interface.
//
// Forward and backward are each one pass over candidate and observed, chunk by chunk; where possible both are done in
// the same pass. For float32 and bfloat16, blocks of kBlock elements are summed in float32 and the blocks' sums in
// float64. A block whose sums leave the safe range of float32 (gradients below 1e-13 or above 1e16, blocks of zeros) is
// summed again in float64.
#include "kernels/matching_loss.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

constexpr int64_t kBlock = 1024;  // elements
// A layer of up to this many elements stays in a core's cache between two passes over it.
constexpr int64_t kOnePass = 1 << 17;
constexpr int64_t kCaches = 8 << 20;            // bytes of gradients that stay in the caches until they are read
constexpr double kLeast = 1e-24, kMost = 1e36;  // safe range of a block's sums of squares in float32
constexpr double kLeastFactor = 1e-30, kMostFactor = 1e30;

template <typename T, int Lanes>
using Elements = typename VectorOf<T, Lanes* static_cast<int>(sizeof(T))>::type;

// Consecutive elements as Acc, which is at least as wide as T.
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
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes, kRows = 2;  // two accumulators hide the latency of additions
  using V = Elements<Acc, kLanes>;
  V inner[kRows] = {}, candidate[kRows] = {}, observed[kRows] = {}, difference[kRows] = {};
  int64_t i = 0;
  for (; i + kRows * kLanes <= size; i += kRows * kLanes) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(c + i + r * kLanes + 2 * kBlock);  // the hardware prefetcher stops at page boundaries
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
  const auto fits = [](double square) R2F_INLINE_LAMBDA { return square >= kLeast && square <= kMost; };
  return fits(sums.candidate) && fits(sums.observed) && fits(sums.difference);
}

// Sums block by block, and calls after_block(first element, elements) while the block is still in the L1 cache.
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

enum class Store { kOrdinary, kNonTemporal };

// result = p x + q y; products and sums in Acc.
template <typename T, typename Acc, int Bytes, Store How>
R2F_INLINE void combine_as(Acc p, const T* x, Acc q, const T* y, Accumulation<T>* result, int64_t size) {
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  using Results = Elements<Accumulation<T>, kLanes>;
  const auto one = [&](int64_t i) R2F_INLINE_LAMBDA {
    result[i] = static_cast<Accumulation<T>>(static_cast<Acc>(widen(x[i])) * p + static_cast<Acc>(widen(y[i])) * q);
  };
  int64_t i = 0;
  if constexpr (How == Store::kNonTemporal)
    for (; i < size && !simd::is_aligned<Results>(result + i); ++i) one(i);
  for (; i + kLanes <= size; i += kLanes) {
    const Elements<Acc, kLanes> sum = load_as<Acc, kLanes>(x + i) * p + load_as<Acc, kLanes>(y + i) * q;
    const Results narrow = __builtin_convertvector(sum, Results);
    if constexpr (How == Store::kNonTemporal)
      simd::store_nontemporal(result + i, narrow);
    else
      simd::store(result + i, narrow);
  }
  for (; i < size; ++i) one(i);
}

template <typename T, int Bytes, Store How>
R2F_INLINE void combine(double p, const T* x, double q, const T* y, Accumulation<T>* result, int64_t size) {
  using Acc = Accumulation<T>;
  const auto fits = [](double factor) R2F_INLINE_LAMBDA {
    const double magnitude = std::fabs(factor);
    return factor == 0 || (magnitude >= kLeastFactor && magnitude <= kMostFactor);
  };
  if (std::is_same_v<T, double> || (fits(p) && fits(q)))
    combine_as<T, Acc, Bytes, How>(static_cast<Acc>(p), x, static_cast<Acc>(q), y, result, size);
  else  // the factors may be outside the range of float32
    combine_as<T, double, Bytes, Store::kOrdinary>(p, x, q, y, result, size);
}

// Calls work(chunk, layer, the chunk's first element in the layer, the chunk's elements) for first <= chunk < last.
template <typename Work>
R2F_INLINE void for_chunks(const MatchingArgs& args, int64_t first, int64_t last, const Work& work) {
  int64_t earlier = 0;  // chunks of earlier layers
  for (int64_t l = 0; l < args.count && earlier < last; ++l) {
    const int64_t size = args.layers[l].size, chunks = matching_chunks(args.layers[l]);
    for (int64_t chunk = std::max(first, earlier); chunk < std::min(last, earlier + chunks); ++chunk) {
      const int64_t begin = (chunk - earlier) * kMatchingChunk;
      work(chunk, l, begin, std::min(kMatchingChunk, size - begin));
    }
    earlier += chunks;
  }
}

// A chunk of one trial of a layer.
template <typename T>
struct Chunk {
  const T *candidate, *observed;
  Accumulation<T>* grad_candidate;

  R2F_INLINE Chunk(const MatchingLayer& layer, int64_t t, int64_t begin) {
    const int64_t offset = t * layer.size + begin;
    candidate = static_cast<const T*>(layer.candidate) + offset;
    observed = static_cast<const T*>(layer.observed) + (layer.observed_is_shared ? begin : offset);
    grad_candidate = static_cast<Accumulation<T>*>(layer.grad_candidate) + offset;
  }
};

template <typename T, int Bytes, Store How>
R2F_INLINE void backward_chunks(const MatchingArgs& args, const MatchingCoefficients* coefficients, int64_t first,
                                int64_t last) {
  for_chunks(args, first, last, [&](int64_t, int64_t l, int64_t begin, int64_t size) R2F_INLINE_LAMBDA {
    for (int64_t t = 0; t < args.trials; ++t) {
      const MatchingCoefficients& k = coefficients[l * args.trials + t];
      const Chunk<T> at(args.layers[l], t, begin);
      combine<T, Bytes, How>(k.observed, at.observed, k.candidate, at.candidate, at.grad_candidate, size);
    }
  });
}

// Computes the sums and, if `with_gradients` is set, the candidate's gradients for the layers for which
// matching_in_one_pass() is true. With kL2 the gradients are computed block by block. With kLayerCosine the
// coefficients depend on all sums of the layer, so the thread that gets the layer's first chunk processes the whole
// layer. One function serves both cases, so that the sums have the same bits with and without gradients.
template <typename T, int Bytes, Store How>
R2F_INLINE void sum_chunks(const MatchingArgs& args, bool with_gradients, int64_t first, int64_t last,
                           MatchingSums* chunk_sums) {
  for_chunks(args, first, last, [&](int64_t chunk, int64_t l, int64_t begin, int64_t size) R2F_INLINE_LAMBDA {
    const MatchingLayer& layer = args.layers[l];
    const bool one_pass = with_gradients && matching_in_one_pass(args.kind, layer);
    const bool by_layer = one_pass && args.kind != MatchingKind::kL2;
    if (by_layer && begin > 0) return;
    if (by_layer) size = layer.size;
    MatchingCoefficients l2{};
    if (one_pass) l2 = matching_coefficients(MatchingKind::kL2, args.weights[l], 1, {}, {});
    for (int64_t t = 0; t < args.trials; ++t) {
      const Chunk<T> at(layer, t, begin);
      MatchingSums total;
      for (int64_t c = 0; c * kMatchingChunk < size; ++c) {
        const int64_t start = c * kMatchingChunk, count = std::min(kMatchingChunk, size - start);
        const T *x = at.candidate + start, *y = at.observed + start;
        MatchingSums& sums = chunk_sums[(chunk + c) * args.trials + t];
        sums = sums_of<T, Bytes>(x, y, count, [&](int64_t i, int64_t elements) R2F_INLINE_LAMBDA {
          if (one_pass && !by_layer)
            combine<T, Bytes, How>(l2.observed, y + i, l2.candidate, x + i, at.grad_candidate + start + i, elements);
        });
        total.add(1, sums);
      }
      if (!by_layer) continue;
      const MatchingCoefficients k = matching_coefficients(args.kind, args.weights[l], 1, total, total);
      combine<T, Bytes, How>(k.observed, at.observed, k.candidate, at.candidate, at.grad_candidate, size);
    }
  });
}

// Whether the gradients exceed the caches. Then non-temporal stores are faster: an ordinary store first reads the line
// that it writes to.
bool exceed_caches(DType dtype, const MatchingArgs& args) {
  int64_t numbers = 0;
  for (int64_t l = 0; l < args.count; ++l) numbers += args.trials * args.layers[l].size;
  return numbers * (dtype == DType::kFloat64 ? 8 : 4) > kCaches;
}

// Calls kernel.operator()<T, Bytes, Store>() with the stores that suit the gradients' size.
template <typename Kernel>
void dispatch(DType dtype, const MatchingArgs& args, const Kernel& kernel) {
  const bool nontemporal = exceed_caches(dtype, args);
  simd::dispatch(dtype, [&]<typename T, int Bytes>() R2F_INLINE_LAMBDA {
    if (!nontemporal) return kernel.template operator()<T, Bytes, Store::kOrdinary>();
    kernel.template operator()<T, Bytes, Store::kNonTemporal>();
    simd::fence_nontemporal_stores();
  });
}

}  // namespace

bool matching_in_one_pass(MatchingKind kind, const MatchingLayer& layer) {
  return kind == MatchingKind::kL2 || (kind == MatchingKind::kLayerCosine && layer.size <= kOnePass);
}

void matching_chunk_sums_cpu(DType dtype, const MatchingArgs& args, bool with_gradients, int64_t first, int64_t last,
                             MatchingSums* chunk_sums) {
  dispatch(dtype, args, [&]<typename T, int Bytes, Store How>() R2F_INLINE_LAMBDA {
    sum_chunks<T, Bytes, How>(args, with_gradients, first, last, chunk_sums);
  });
}

void matching_layer_sums_cpu(const MatchingArgs& args, const MatchingSums* chunk_sums, MatchingSums* sums) {
  int64_t chunk = 0;
  for (int64_t l = 0; l < args.count; ++l) {
    MatchingSums* layer_sums = sums + l * args.trials;
    std::fill_n(layer_sums, args.trials, MatchingSums{});
    for (const int64_t last = chunk + matching_chunks(args.layers[l]); chunk < last; ++chunk)
      for (int64_t t = 0; t < args.trials; ++t) layer_sums[t].add(1, chunk_sums[chunk * args.trials + t]);
  }
}

void matching_loss_backward_cpu(DType dtype, const MatchingArgs& args, const MatchingCoefficients* coefficients,
                                int64_t first, int64_t last) {
  dispatch(dtype, args, [&]<typename T, int Bytes, Store How>() R2F_INLINE_LAMBDA {
    backward_chunks<T, Bytes, How>(args, coefficients, first, last);
  });
}

}  // namespace r2f
