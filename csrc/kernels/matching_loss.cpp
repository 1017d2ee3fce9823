// Distances between lists of gradients on the CPU. See matching_loss.h for what is computed.
//
// Forward and backward are one pass over candidate and observed each, piece by piece. Products and sums are taken in
// float64 whatever the element type: memory is the limit, and neither a square of 1e-30 nor |c - o|^2 loses a digit.
#include "kernels/matching_loss.h"

#include <algorithm>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

template <typename T, int Lanes>
using Elements = typename VectorOf<T, Lanes* static_cast<int>(sizeof(T))>::type;

// Some neighbouring elements as float64.
template <int Lanes>
R2F_INLINE Elements<double, Lanes> load_wide(const float* p) {
  return __builtin_convertvector(simd::load<Elements<float, Lanes>>(p), Elements<double, Lanes>);
}
template <int Lanes>
R2F_INLINE Elements<double, Lanes> load_wide(const double* p) {
  return simd::load<Elements<double, Lanes>>(p);
}
template <int Lanes>
R2F_INLINE Elements<double, Lanes> load_wide(const BFloat16* p) {
  const auto bits = simd::load<Elements<uint16_t, Lanes>>(p);
  const Elements<uint32_t, Lanes> upper = __builtin_convertvector(bits, Elements<uint32_t, Lanes>) << 16;
  Elements<float, Lanes> values;
  std::memcpy(&values, &upper, sizeof(values));
  return __builtin_convertvector(values, Elements<double, Lanes>);
}

template <int Lanes>
R2F_INLINE void store_narrow(float* p, const Elements<double, Lanes>& v) {
  const auto narrow = __builtin_convertvector(v, Elements<float, Lanes>);
  simd::store(p, narrow);
}
template <int Lanes>
R2F_INLINE void store_narrow(double* p, const Elements<double, Lanes>& v) {
  simd::store(p, v);
}

template <typename T, int Bytes>
R2F_INLINE MatchingSums sums_of(const T* c, const T* o, int64_t size) {
  constexpr int kLanes = VectorOf<double, Bytes>::kLanes, kRows = 2;  // two of each sum hide the adds' latency
  using V = Elements<double, kLanes>;
  V inner[kRows] = {}, candidate[kRows] = {}, observed[kRows] = {}, difference[kRows] = {};
  int64_t i = 0;
  for (; i + kRows * kLanes <= size; i += kRows * kLanes) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const V a = load_wide<kLanes>(c + i + r * kLanes), b = load_wide<kLanes>(o + i + r * kLanes), d = a - b;
      inner[r] += a * b;
      candidate[r] += a * a;
      observed[r] += b * b;
      difference[r] += d * d;
    }
  }
  const auto total = [](const V* rows) __attribute__((always_inline)) {
    const V both = rows[0] + rows[1];
    return simd::sum_lanes<double, Bytes>(both);
  };
  MatchingSums sums{total(inner), total(candidate), total(observed), total(difference)};
  for (; i < size; ++i) {
    const double a = widen(c[i]), b = widen(o[i]);
    sums.add(1, {a * b, a * a, b * b, (a - b) * (a - b)});
  }
  return sums;
}

// result = p x + q y, or added to what is there.
template <typename T, int Bytes, bool Add>
R2F_INLINE void combine(double p, const T* x, double q, const T* y, Accumulation<T>* result, int64_t size) {
  constexpr int kLanes = VectorOf<double, Bytes>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Elements<double, kLanes> sum = load_wide<kLanes>(x + i) * p + load_wide<kLanes>(y + i) * q;
    if constexpr (Add) sum += load_wide<kLanes>(result + i);
    store_narrow<kLanes>(result + i, sum);
  }
  for (; i < size; ++i) {
    const double sum = widen(x[i]) * p + widen(y[i]) * q;
    result[i] = static_cast<Accumulation<T>>(Add ? result[i] + sum : sum);
  }
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

template <typename T, int Bytes>
R2F_INLINE void sum_pieces(const MatchingArgs& args, int64_t first, int64_t last, MatchingSums* of_pieces) {
  for_pieces(args, first, last,
             [&](int64_t piece, int64_t l, int64_t begin, int64_t size) __attribute__((always_inline)) {
               const MatchingLayer& layer = args.layers[l];
               const T* c = static_cast<const T*>(layer.candidate) + begin;
               const T* o = static_cast<const T*>(layer.observed) + begin;
               for (int64_t t = 0; t < args.trials; ++t)
                 of_pieces[piece * args.trials + t] =
                     sums_of<T, Bytes>(c + t * layer.size, o + (layer.observed_is_shared ? 0 : t * layer.size), size);
             });
}

template <typename T, int Bytes>
R2F_INLINE void backward_pieces(const MatchingArgs& args, const MatchingCoefficients* coefficients, int64_t first,
                                int64_t last) {
  using Acc = Accumulation<T>;
  for_pieces(args, first, last, [&](int64_t, int64_t l, int64_t begin, int64_t size) __attribute__((always_inline)) {
    const MatchingLayer& layer = args.layers[l];
    for (int64_t t = 0; t < args.trials; ++t) {
      const MatchingCoefficients& k = coefficients[l * args.trials + t];
      const int64_t own = t * layer.size + begin, theirs = layer.observed_is_shared ? begin : own;
      const T* c = static_cast<const T*>(layer.candidate) + own;
      const T* o = static_cast<const T*>(layer.observed) + theirs;
      combine<T, Bytes, false>(k.observed, o, k.candidate, c, static_cast<Acc*>(layer.grad_candidate) + own, size);
      if (layer.grad_observed == nullptr) continue;
      Acc* to_observed = static_cast<Acc*>(layer.grad_observed) + theirs;
      if (layer.observed_is_shared && t > 0)
        combine<T, Bytes, true>(k.observed, c, k.itself, o, to_observed, size);
      else
        combine<T, Bytes, false>(k.observed, c, k.itself, o, to_observed, size);
    }
  });
}

// What is wanted, in one piece: the entries below differ by instruction set only.
struct Wanted {
  MatchingSums* of_pieces;  // null: gradients
  const MatchingCoefficients* coefficients;
};

template <typename T, int Bytes>
R2F_INLINE void run_pieces(const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  if (wanted.of_pieces != nullptr)
    sum_pieces<T, Bytes>(args, first, last, wanted.of_pieces);
  else
    backward_pieces<T, Bytes>(args, wanted.coefficients, first, last);
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const MatchingArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return run_pieces<float, Bytes>(args, wanted, first, last);
    case DType::kFloat64: return run_pieces<double, Bytes>(args, wanted, first, last);
    case DType::kBFloat16: return run_pieces<BFloat16, Bytes>(args, wanted, first, last);
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

void matching_piece_sums_cpu(DType dtype, const MatchingArgs& args, int64_t first, int64_t last,
                             MatchingSums* of_pieces) {
  run(dtype, args, {of_pieces, nullptr}, first, last);
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
  run(dtype, args, {nullptr, coefficients}, first, last);
}

}  // namespace r2f
