// torch.ops.r2f.lora_grad on compiled kernels. The schema and the meaning are in r2f_ext/ops.
#include "kernels/lora_grad.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "torch/glue.h"

namespace r2f {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Contiguous inputs, the results, and the plain description of both that the kernels take.
struct Call {
  at::Tensor x, delta, A, B, offsets, grad_A, grad_B, A1, B1;
  DType dtype;
  LoraGradArgs args;

  Results results() const { return {grad_A, grad_B, A1, B1}; }
};

// [P, N, d_in] and [P, N, d_out]; with offsets [P + 1], [M, d_in] and [M, d_out].
void check_rows(const at::Tensor& x, const at::Tensor& delta, const std::optional<at::Tensor>& offsets) {
  const int64_t dims = offsets.has_value() ? 2 : 3;
  TORCH_CHECK(
      x.dim() == dims && delta.dim() == dims && x.sizes().slice(0, dims - 1) == delta.sizes().slice(0, dims - 1),
      "lora_grad: x must be [P, N, d_in] and delta [P, N, d_out], or [M, d_in] and [M, d_out] with offsets");
  if (!offsets.has_value()) return;
  TORCH_CHECK(offsets->dim() == 1 && offsets->size(0) >= 1 && offsets->scalar_type() == at::kLong &&
                  offsets->device() == x.device(),
              "lora_grad: offsets must be int64 [P + 1], on the device of x");
}

// On the CPU only: values on a GPU are not waited for.
void check_values(const at::Tensor& offsets, int64_t rows) {
  const int64_t *first = offsets.const_data_ptr<int64_t>(), *end = first + offsets.size(0);
  TORCH_CHECK_VALUE(*first == 0 && end[-1] == rows && std::is_sorted(first, end),
                    "lora_grad: offsets must start at 0, never decrease, and end at the ", rows, " rows of x");
}

Call prepare(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A, const std::optional<at::Tensor>& B,
             double scale, std::optional<double> lr, const std::optional<at::Tensor>& offsets) {
  const bool with_B = B.has_value();
  check_rows(x, delta, offsets);
  const int64_t P = offsets.has_value() ? offsets->size(0) - 1 : x.size(0), d_in = x.size(-1), d_out = delta.size(-1);
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
  if (offsets.has_value()) call.offsets = offsets->contiguous();

  const auto options = glue::result_options(x);
  const auto result = [&](bool wanted, at::IntArrayRef shape) {
    return at::empty(wanted ? shape : at::IntArrayRef{0}, options);
  };
  const std::array<int64_t, 3> like_A{P, rank, d_in};
  // Without B, zero and A itself; expanded, so that they cost nothing.
  call.grad_A = with_B ? at::empty(like_A, options) : at::zeros({}, options).expand(like_A);
  call.grad_B = result(true, {P, d_out, rank});
  call.A1 = with_B || !lr.has_value() ? result(lr.has_value(), like_A)
                                      : A.to(options, /*non_blocking=*/false, /*copy=*/true).expand(like_A);
  call.B1 = result(lr.has_value(), {P, d_out, rank});

  LoraGradArgs& args = call.args;
  args.groups = P, args.rows = offsets.has_value() ? x.size(0) : P * x.size(1), args.d_in = d_in, args.d_out = d_out,
  args.rank = rank;
  if (offsets.has_value()) args.offsets = call.offsets.const_data_ptr<int64_t>();
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
                         const std::optional<at::Tensor>& B, double scale, std::optional<double> lr,
                         const std::optional<at::Tensor>& offsets) {
  const Call call = prepare(x, delta, A, B, scale, lr, offsets);
  const LoraGradArgs& args = call.args;
  if (offsets.has_value()) check_values(call.offsets, args.rows);
  const int64_t share = (args.rows + at::get_num_threads() - 1) / at::get_num_threads();
  int64_t most = 0;
  for (int64_t p = 0; p < args.groups; ++p) most = std::max(most, args.first_row(p + 1) - args.first_row(p));
  if (args.groups % at::get_num_threads() != 0 && 4 * most > share && at::get_num_threads() > 1) {
    // Whole groups would leave threads waiting.
    const at::Tensor factors = at::empty({lora_grad_cpu_workspace(args)}, call.grad_B.options());
    void* workspace = factors.mutable_data_ptr();
    at::parallel_for(0, args.rows, 24, [&](int64_t first, int64_t last) {
      lora_grad_cpu_factors(call.dtype, args, workspace, first, last);
    });
    at::parallel_for(0, lora_grad_cpu_items(args), 1, [&](int64_t first, int64_t last) {
      lora_grad_cpu_sums(call.dtype, args, workspace, first, last);
    });
    return call.results();
  }
  // A thread takes the groups that start in its share of the rows; the last one also those without rows at the end.
  at::parallel_for(0, std::max<int64_t>(args.rows, 1), 1, [&](int64_t first, int64_t last) {
    const int64_t end = last >= args.rows ? args.groups : args.first_group_from(last);
    lora_grad_cpu(call.dtype, args, args.first_group_from(first), end);
  });
  return call.results();
}

#ifdef R2F_WITH_CUDA
Results lora_grad_on_cuda(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A,
                          const std::optional<at::Tensor>& B, double scale, std::optional<double> lr,
                          const std::optional<at::Tensor>& offsets) {
  const c10::DeviceGuard guard(x.device());
  const Call call = prepare(x, delta, A, B, scale, lr, offsets);
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
