// torch.ops.r2f.signed_adam_step_ on compiled kernels. The schema and the meaning are in r2f_ext/ops.
#include "kernels/signed_adam_step.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

#include "torch/glue.h"

namespace r2f {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread

using Launch = void (*)(DType dtype, const SignedAdamArgs& args, const at::Device& device);

void step_with(Launch launch, at::Tensor& image, const at::Tensor& gradient, at::Tensor& exp_avg,
               at::Tensor& exp_avg_sq, SignedAdamArgs args) {
  for (const at::Tensor& t : {gradient, exp_avg, exp_avg_sq})
    TORCH_CHECK(t.sizes() == image.sizes() && t.scalar_type() == image.scalar_type() && t.device() == image.device(),
                "signed_adam_step_: image, gradient, exp_avg and exp_avg_sq must agree in shape, dtype and device");
  const DType dtype = glue::dtype_of("signed_adam_step_", image);
  TORCH_CHECK(dtype != DType::kBFloat16, "signed_adam_step_: float32 or float64 is needed");
  if (image.numel() == 0) return;

  // Contiguous tensors are updated directly, others through copies that are written back.
  const at::Tensor pixels = image.contiguous(), g = gradient.contiguous();
  const at::Tensor m = exp_avg.contiguous(), v = exp_avg_sq.contiguous();
  args.image = pixels.mutable_data_ptr(), args.gradient = g.const_data_ptr();
  args.exp_avg = m.mutable_data_ptr(), args.exp_avg_sq = v.mutable_data_ptr();
  args.size = image.numel();
  launch(dtype, args, image.device());
  if (!pixels.is_same(image)) image.copy_(pixels);
  if (!m.is_same(exp_avg)) exp_avg.copy_(m);
  if (!v.is_same(exp_avg_sq)) exp_avg_sq.copy_(v);
}

SignedAdamArgs scalars(double lr, double beta1, double beta2, double eps, int64_t step, std::optional<double> low,
                       std::optional<double> high, bool sign) {
  SignedAdamArgs args;
  args.lr = lr, args.beta1 = beta1, args.beta2 = beta2, args.eps = eps, args.step = step, args.sign = sign;
  args.low = low.value_or(args.low), args.high = high.value_or(args.high);
  return args;
}

void step_on_cpu(at::Tensor& image, const at::Tensor& gradient, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, double lr,
                 double beta1, double beta2, double eps, int64_t step, std::optional<double> low,
                 std::optional<double> high, bool sign) {
  const Launch launch = [](DType dtype, const SignedAdamArgs& args, const at::Device&) {
    at::parallel_for(0, args.size, kGrain,
                     [&](int64_t first, int64_t last) { signed_adam_step_cpu(dtype, args, first, last); });
  };
  step_with(launch, image, gradient, exp_avg, exp_avg_sq, scalars(lr, beta1, beta2, eps, step, low, high, sign));
}

#ifdef R2F_WITH_CUDA
void step_on_cuda(at::Tensor& image, const at::Tensor& gradient, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, double lr,
                  double beta1, double beta2, double eps, int64_t step, std::optional<double> low,
                  std::optional<double> high, bool sign) {
  const c10::DeviceGuard guard(image.device());
  const Launch launch = [](DType dtype, const SignedAdamArgs& args, const at::Device& device) {
    glue::check_launch("signed_adam_step_", signed_adam_step_cuda(dtype, args, glue::current_stream(device)));
  };
  step_with(launch, image, gradient, exp_avg, exp_avg_sq, scalars(lr, beta1, beta2, eps, step, low, high, sign));
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) { library.impl("signed_adam_step_", &step_on_cuda); }
#endif

TORCH_LIBRARY_IMPL(r2f, CPU, library) { library.impl("signed_adam_step_", &step_on_cpu); }

}  // namespace
}  // namespace r2f
