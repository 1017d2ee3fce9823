// The signed Adam step on the CPU. See signed_adam_step.h for the formulas.
#include "kernels/signed_adam_step.h"

#include <cstring>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

// Updates one vector of elements.
template <typename Acc, int Bytes, bool Sign>
R2F_INLINE void step_vector(const SignedAdamScalars<Acc>& k, Acc* image, const Acc* gradient, Acc* exp_avg,
                            Acc* exp_avg_sq) {
  using V = typename VectorOf<Acc, Bytes>::type;
  V g = simd::load<V>(gradient);
  if constexpr (Sign) {
    const V one = V{} + 1, not_below = g > 0 ? one : V{};
    g = g < 0 ? -one : not_below;
  }
  const V average = simd::load<V>(exp_avg), m = average + (g - average) * k.toward_g;
  const V v = simd::load<V>(exp_avg_sq) * k.beta2 + g * g * k.one_minus_beta2;
  const V size = simd::square_root<Acc, Bytes>(v) * k.one_over_root + k.eps;
  const V stepped = simd::load<V>(image) - m / size * k.step_size;
  const V low = V{} + k.low, high = V{} + k.high;
  const V raised = stepped < low ? low : stepped, inside = raised > high ? high : raised;  // NaN stays
  simd::store(exp_avg, m);
  simd::store(exp_avg_sq, v);
  simd::store(image, inside);
}

template <typename Acc, int Bytes, bool Sign>
R2F_INLINE void step_range(const SignedAdamArgs& args, int64_t first, int64_t last) {
  constexpr int64_t kLanes = VectorOf<Acc, Bytes>::kLanes;
  const SignedAdamScalars<Acc> k(args);
  Acc* const arrays[3] = {static_cast<Acc*>(args.image), static_cast<Acc*>(args.exp_avg),
                          static_cast<Acc*>(args.exp_avg_sq)};
  const Acc* gradient = static_cast<const Acc*>(args.gradient);
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes)
    step_vector<Acc, Bytes, Sign>(k, arrays[0] + i, gradient + i, arrays[1] + i, arrays[2] + i);
  if (i == last) return;

  // The remainder goes through a padded vector, so that the result of an element does not depend on its position.
  Acc rest[4][kLanes] = {};
  const size_t bytes = static_cast<size_t>(last - i) * sizeof(Acc);
  for (int a = 0; a < 3; ++a) std::memcpy(rest[a], arrays[a] + i, bytes);
  std::memcpy(rest[3], gradient + i, bytes);
  step_vector<Acc, Bytes, Sign>(k, rest[0], rest[3], rest[1], rest[2]);
  for (int a = 0; a < 3; ++a) std::memcpy(arrays[a] + i, rest[a], bytes);
}

template <int Bytes>
R2F_INLINE void run(DType dtype, const SignedAdamArgs& args, int64_t first, int64_t last) {
  if (dtype == DType::kFloat64)
    args.sign ? step_range<double, Bytes, true>(args, first, last)
              : step_range<double, Bytes, false>(args, first, last);
  else
    args.sign ? step_range<float, Bytes, true>(args, first, last) : step_range<float, Bytes, false>(args, first, last);
}

}  // namespace

void signed_adam_step_cpu(DType dtype, const SignedAdamArgs& args, int64_t first, int64_t last) {
  simd::dispatch_isa([&]<int Bytes>() R2F_INLINE_LAMBDA { run<Bytes>(dtype, args, first, last); });
}

}  // namespace r2f
