// torch.ops.r2f.lora_grad_tangent on compiled kernels. The schema and the meaning are in r2f_ext/ops.
#include "kernels/lora_grad_tangent.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "torch/glue.h"

namespace r2f {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;

// Contiguous inputs, the results, and the plain description of both that the kernels take.
struct Call {
  at::Tensor x, delta, dx, ddelta, A, B, grad_A, grad_B;
  DType dtype;
  LoraGradTangentArgs args;

  Results results() const { return {grad_A, grad_B}; }
};

// The number of directions.
int64_t check(const at::Tensor& x, const at::Tensor& delta, const std::optional<at::Tensor>& dx,
              const std::optional<at::Tensor>& ddelta, const at::Tensor& A, const std::optional<at::Tensor>& B) {
  TORCH_CHECK(x.dim() == 3 && delta.dim() == 3 && x.sizes().slice(0, 2) == delta.sizes().slice(0, 2),
              "lora_grad_tangent: x must be [P, N, d_in] and delta [P, N, d_out]");
  TORCH_CHECK(dx.has_value() || ddelta.has_value(), "lora_grad_tangent: dx or ddelta is needed");
  const int64_t P = x.size(0), K = (dx.has_value() ? *dx : *ddelta).size(0);
  TORCH_CHECK(!dx.has_value() || (dx->dim() == 4 && dx->size(0) == K && dx->sizes().slice(1) == x.sizes()),
              "lora_grad_tangent: dx must be [K, P, N, d_in]");
  TORCH_CHECK(
      !ddelta.has_value() || (ddelta->dim() == 4 && ddelta->size(0) == K && ddelta->sizes().slice(1) == delta.sizes()),
      "lora_grad_tangent: ddelta must be [K, P, N, d_out]");
  TORCH_CHECK((A.dim() == 2 || (A.dim() == 3 && A.size(0) == P)) && A.size(-1) == x.size(2) && A.size(-2) >= 1,
              "lora_grad_tangent: A must be [r, d_in] or [P, r, d_in]");
  TORCH_CHECK(!B.has_value() || ((B->dim() == 2 || (B->dim() == 3 && B->size(0) == P)) &&
                                 B->size(-2) == delta.size(2) && B->size(-1) == A.size(-2)),
              "lora_grad_tangent: B must be [d_out, r] or [P, d_out, r]");
  for (const at::Tensor& t : {delta, dx.value_or(x), ddelta.value_or(x), A, B.value_or(x)})
    TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(),
                "lora_grad_tangent: one dtype and one device");
  return K;
}

// An input without elements contributes nothing, but its address is null, which would mean that it is not there.
const void* data_of(const at::Tensor& tensor) {
  static constexpr double kNothing = 0;
  return tensor.numel() == 0 ? &kNothing : tensor.const_data_ptr();
}

Call prepare(const at::Tensor& x, const at::Tensor& delta, const std::optional<at::Tensor>& dx,
             const std::optional<at::Tensor>& ddelta, const at::Tensor& A, const std::optional<at::Tensor>& B,
             double scale) {
  const int64_t K = check(x, delta, dx, ddelta, A, B);
  const int64_t P = x.size(0), d_in = x.size(2), d_out = delta.size(2), rank = A.size(-2);
  Call call;
  call.dtype = glue::dtype_of("lora_grad_tangent", x);
  call.x = x.contiguous(), call.delta = delta.contiguous(), call.A = A.contiguous();
  const auto options = glue::result_options(x);
  call.grad_B = at::empty({K, P, d_out, rank}, options);
  call.grad_A = B.has_value() ? at::empty({K, P, rank, d_in}, options) : at::empty({0}, options);

  LoraGradTangentArgs& args = call.args;
  args.groups = P, args.directions = K, args.tokens = x.size(1), args.d_in = d_in, args.d_out = d_out, args.rank = rank;
  args.x = call.x.const_data_ptr(), args.delta = call.delta.const_data_ptr(), args.A = call.A.const_data_ptr();
  if (dx.has_value()) call.dx = dx->contiguous(), args.dx = data_of(call.dx);
  if (ddelta.has_value()) call.ddelta = ddelta->contiguous(), args.ddelta = data_of(call.ddelta);
  if (B.has_value()) call.B = B->contiguous(), args.B = data_of(call.B), args.B_per_group = B->dim() == 3;
  args.A_per_group = A.dim() == 3;
  args.scale = scale;
  args.grad_A = glue::data_or_null(call.grad_A), args.grad_B = glue::data_or_null(call.grad_B);
  return call;
}

Results lora_grad_tangent_on_cpu(const at::Tensor& x, const at::Tensor& delta, const std::optional<at::Tensor>& dx,
                                 const std::optional<at::Tensor>& ddelta, const at::Tensor& A,
                                 const std::optional<at::Tensor>& B, double scale) {
  const Call call = prepare(x, delta, dx, ddelta, A, B, scale);
  at::parallel_for(0, call.args.groups * call.args.directions, 1,
                   [&](int64_t first, int64_t last) { lora_grad_tangent_cpu(call.dtype, call.args, first, last); });
  return call.results();
}

#ifdef R2F_WITH_CUDA
Results lora_grad_tangent_on_cuda(const at::Tensor& x, const at::Tensor& delta, const std::optional<at::Tensor>& dx,
                                  const std::optional<at::Tensor>& ddelta, const at::Tensor& A,
                                  const std::optional<at::Tensor>& B, double scale) {
  const c10::DeviceGuard guard(x.device());
  const Call call = prepare(x, delta, dx, ddelta, A, B, scale);
  const at::Tensor workspace = at::empty({lora_grad_tangent_cuda_workspace(call.args)}, call.grad_B.options());
  const char* error =
      lora_grad_tangent_cuda(call.dtype, call.args, workspace.mutable_data_ptr(), glue::current_stream(x.device()));
  glue::check_launch("lora_grad_tangent", error);
  return call.results();
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) { library.impl("lora_grad_tangent", &lora_grad_tangent_on_cuda); }
#endif

TORCH_LIBRARY_IMPL(r2f, CPU, library) { library.impl("lora_grad_tangent", &lora_grad_tangent_on_cpu); }

}  // namespace
}  // namespace r2f
