// torch.ops.r2f.lora_grad on compiled kernels. The schema and the meaning are in r2f_ext/ops.
#include "kernels/lora_grad.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "torch/glue.h"

namespace r2f {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Contiguous inputs, the results, and the plain description of both that the kernels take.
struct Call {
  at::Tensor x, delta, A, B, grad_A, grad_B, A1, B1;
  DType dtype;
  LoraGradArgs args;

  Results results() const { return {grad_A, grad_B, A1, B1}; }
};

Call prepare(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A, const std::optional<at::Tensor>& B,
             double scale, std::optional<double> lr) {
  const bool with_B = B.has_value();
  TORCH_CHECK(x.dim() == 3 && delta.dim() == 3 && x.size(0) == delta.size(0) && x.size(1) == delta.size(1),
              "lora_grad: x must be [P, N, d_in] and delta [P, N, d_out]");
  const int64_t P = x.size(0), d_in = x.size(2), d_out = delta.size(2);
  TORCH_CHECK((A.dim() == 2 || (A.dim() == 3 && A.size(0) == P)) && A.size(-1) == d_in && A.size(-2) >= 1,
              "lora_grad: A must be [r, d_in] or [P, r, d_in]");
  const int64_t rank = A.size(-2);
  TORCH_CHECK(
      !with_B || ((B->dim() == 2 || (B->dim() == 3 && B->size(0) == P)) && B->size(-2) == d_out && B->size(-1) == rank),
      "lora_grad: B must be [d_out, r] or [P, d_out, r]");
  for (const at::Tensor& t : {delta, A, with_B ? *B : A})
    TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), "lora_grad: one dtype and one device");

  Call call;
  call.dtype = glue::dtype_of("lora_grad", x);
  call.x = x.contiguous(), call.delta = delta.contiguous(), call.A = A.contiguous();
  if (with_B) call.B = B->contiguous();

  const auto options = glue::result_options(x);
  const auto result = [&](bool wanted, at::IntArrayRef shape) {
    return at::empty(wanted ? shape : at::IntArrayRef{0}, options);
  };
  call.grad_A = result(with_B, {P, rank, d_in});
  call.grad_B = result(true, {P, d_out, rank});
  call.A1 = result(with_B && lr.has_value(), {P, rank, d_in});
  call.B1 = result(lr.has_value(), {P, d_out, rank});

  LoraGradArgs& args = call.args;
  args.groups = P, args.tokens = x.size(1), args.d_in = d_in, args.d_out = d_out, args.rank = rank;
  args.x = call.x.const_data_ptr(), args.delta = call.delta.const_data_ptr(), args.A = call.A.const_data_ptr();
  args.A_per_group = A.dim() == 3;
  args.scale = scale, args.lr = lr.value_or(0);
  args.grad_B = glue::data_or_null(call.grad_B), args.B1 = glue::data_or_null(call.B1);
  // A B without elements (d_out = 0) contributes nothing, but its address is null, which would mean "no B".
  if (with_B) {
    static constexpr double kNothing = 0;
    args.B = call.B.numel() == 0 ? &kNothing : call.B.const_data_ptr();
    args.B_per_group = B->dim() == 3;
    args.grad_A = glue::data_or_null(call.grad_A), args.A1 = glue::data_or_null(call.A1);
  }
  return call;
}

Results lora_grad_on_cpu(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A,
                         const std::optional<at::Tensor>& B, double scale, std::optional<double> lr) {
  const Call call = prepare(x, delta, A, B, scale, lr);
  // Every group costs the same. A thread takes a run of groups; fewer groups than threads leave threads idle.
  at::parallel_for(0, call.args.groups, 1,
                   [&](int64_t first, int64_t last) { lora_grad_cpu(call.dtype, call.args, first, last); });
  return call.results();
}

#ifdef R2F_WITH_CUDA
Results lora_grad_on_cuda(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A,
                          const std::optional<at::Tensor>& B, double scale, std::optional<double> lr) {
  const c10::DeviceGuard guard(x.device());
  const Call call = prepare(x, delta, A, B, scale, lr);
  const at::Tensor workspace = at::empty({lora_grad_cuda_workspace(call.args)}, call.grad_B.options());
  const char* error =
      lora_grad_cuda(call.dtype, call.args, workspace.mutable_data_ptr(), glue::current_stream(x.device()));
  glue::check_launch("lora_grad", error);
  return call.results();
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) { library.impl("lora_grad", &lora_grad_on_cuda); }
#endif

TORCH_LIBRARY_IMPL(r2f, CPU, library) { library.impl("lora_grad", &lora_grad_on_cpu); }

}  // namespace
}  // namespace r2f
