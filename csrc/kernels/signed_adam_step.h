// One step of (signed) Adam on pixels and the projection onto their box, in place: the arguments of the kernels. No
// torch and no CUDA here; csrc/torch/signed_adam_step.cpp fills them in.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "r2f/dtype.h"

namespace r2f {

// With g = sign(gradient), or the gradient itself, elementwise:
//   m += (1 - beta1) (g - m)         v = beta2 v + (1 - beta2) g^2
//   image = clamp(image - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps), low, high)
struct SignedAdamArgs {
  void* image = nullptr;  // four arrays of `size` elements
  const void* gradient = nullptr;
  void* exp_avg = nullptr;     // m
  void* exp_avg_sq = nullptr;  // v
  int64_t size = 0;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0;
  int64_t step = 1;                                       // the number of this step, from 1
  double low = -std::numeric_limits<double>::infinity();  // infinite: no bound
  double high = std::numeric_limits<double>::infinity();
  bool sign = true;
};

// The scalars of a step, rounded once to the type of the elements.
template <typename Acc>
struct SignedAdamScalars {
  Acc toward_g, beta2, one_minus_beta2, step_size, one_over_root, eps, low, high;

  explicit SignedAdamScalars(const SignedAdamArgs& args) {
    const double n = static_cast<double>(args.step);
    toward_g = static_cast<Acc>(1 - args.beta1), beta2 = static_cast<Acc>(args.beta2);
    one_minus_beta2 = static_cast<Acc>(1 - args.beta2), eps = static_cast<Acc>(args.eps);
    step_size = static_cast<Acc>(args.lr / (1 - std::pow(args.beta1, n)));
    one_over_root = static_cast<Acc>(1 / std::sqrt(1 - std::pow(args.beta2, n)));
    low = static_cast<Acc>(args.low), high = static_cast<Acc>(args.high);
  }
};

// Elements first <= i < last, on the calling thread. float32 or float64.
void signed_adam_step_cpu(DType dtype, const SignedAdamArgs& args, int64_t first, int64_t last);

// All elements, queued on `stream` (a cudaStream_t). Returns null, or CUDA's error message.
const char* signed_adam_step_cuda(DType dtype, const SignedAdamArgs& args, void* stream);

}  // namespace r2f
