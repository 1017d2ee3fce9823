// The signed Adam step on CUDA. See signed_adam_step.h for the formulas. One pass over the arrays, with 16-byte loads
// and stores if all addresses are aligned.
#include "kernels/signed_adam_step.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kThreads = 256;

template <typename Acc>
constexpr int kPack = 16 / static_cast<int>(sizeof(Acc));

template <typename Acc>
struct Arrays {
  Acc* image;
  const Acc* gradient;
  Acc *exp_avg, *exp_avg_sq;
  int64_t size;
};

template <typename Acc, int N, bool kSign>
__global__ void __launch_bounds__(kThreads) step(Arrays<Acc> arrays, SignedAdamScalars<Acc> k) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < arrays.size; i += stride) {
    const int64_t left = arrays.size - i;
    const bool whole = left >= N;
    const auto gradient = load_pack<Acc, N>(arrays.gradient + i, left, whole);
    auto image = load_pack<Acc, N>(arrays.image + i, left, whole);
    auto exp_avg = load_pack<Acc, N>(arrays.exp_avg + i, left, whole);
    auto exp_avg_sq = load_pack<Acc, N>(arrays.exp_avg_sq + i, left, whole);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      Acc g = gradient.element[e];
      if constexpr (kSign) g = static_cast<Acc>(g > 0) - static_cast<Acc>(g < 0);
      Acc &m = exp_avg.element[e], &v = exp_avg_sq.element[e], &x = image.element[e];
      m += (g - m) * k.toward_g;
      v = v * k.beta2 + g * g * k.one_minus_beta2;
      x -= m / (sqrt(v) * k.one_over_root + k.eps) * k.step_size;
      x = x < k.low ? k.low : x;
      x = x > k.high ? k.high : x;  // NaN stays
    }
    store_pack(arrays.image + i, image, left, whole);
    store_pack(arrays.exp_avg + i, exp_avg, left, whole);
    store_pack(arrays.exp_avg_sq + i, exp_avg_sq, left, whole);
  }
}

template <typename Acc, int N>
void run(const Arrays<Acc>& arrays, const SignedAdamArgs& args, cudaStream_t stream) {
  const SignedAdamScalars<Acc> scalars(args);
  const unsigned blocks = grid_for((arrays.size + kThreads * N - 1) / (kThreads * N));
  if (args.sign)
    launch(step<Acc, N, true>, blocks, kThreads, 0, stream, arrays, scalars);
  else
    launch(step<Acc, N, false>, blocks, kThreads, 0, stream, arrays, scalars);
}

template <typename Acc>
void run(const SignedAdamArgs& args, cudaStream_t stream) {
  const Arrays<Acc> arrays{static_cast<Acc*>(args.image), static_cast<const Acc*>(args.gradient),
                           static_cast<Acc*>(args.exp_avg), static_cast<Acc*>(args.exp_avg_sq), args.size};
  const auto bits = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool aligned = (bits(args.image) | bits(args.gradient) | bits(args.exp_avg) | bits(args.exp_avg_sq)) % 16 == 0;
  aligned ? run<Acc, kPack<Acc>>(arrays, args, stream) : run<Acc, 1>(arrays, args, stream);
}

}  // namespace

const char* signed_adam_step_cuda(DType dtype, const SignedAdamArgs& args, void* stream) {
  if (args.size == 0) return nullptr;
  if (dtype == DType::kFloat64)
    run<double>(args, static_cast<cudaStream_t>(stream));
  else
    run<float>(args, static_cast<cudaStream_t>(stream));
  return launch_error();
}

}  // namespace r2f
