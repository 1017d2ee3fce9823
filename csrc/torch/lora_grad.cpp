// torch.ops.r2f.lora_grad and lora_grad_tangent. The schemas and the meaning are in r2f_ext/ops.
//
// Matrix products are library calls, layer by layer in C++. On CUDA, all layers that kernels/lora_grad.cu supports are
// computed by its two launches, or four for tangents. The library's products also scale their results and write them
// directly to the output, because a separate pass for either takes as long as a small product. On the CPU, products
// that read and write long rows are faster.
#include "kernels/lora_grad.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "torch/glue.h"

namespace r2f {
namespace {

void check_layer(const char* op, const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A) {
  TORCH_CHECK(x.dim() == 3 && delta.dim() == 3 && x.sizes().slice(0, 2) == delta.sizes().slice(0, 2), op,
              ": x must be [P, N, d_in] and delta [P, N, d_out]");
  TORCH_CHECK((A.dim() == 2 || (A.dim() == 3 && A.size(0) == x.size(0))) && A.size(-1) == x.size(2) && A.size(-2) >= 1,
              op, ": A must be [r, d_in] or [P, r, d_in]");
}

void check_alike(const char* op, const at::Tensor& first, at::TensorList tensors) {
  for (const at::Tensor& t : tensors)
    TORCH_CHECK(t.scalar_type() == first.scalar_type() && t.device() == first.device(), op,
                ": one dtype and one device");
}

void check_lora_grad(at::TensorList x, at::TensorList delta, at::TensorList A, at::TensorList B,
                     at::ArrayRef<double> scales) {
  const char* op = "lora_grad";
  TORCH_CHECK(!x.empty() && x.size() == delta.size() && x.size() == A.size() && x.size() == scales.size() &&
                  (B.empty() || B.size() == x.size()),
              "lora_grad: lists of one length are needed");
  for (size_t l = 0; l < x.size(); ++l) {
    check_layer(op, x[l], delta[l], A[l]);
    if (B.empty()) continue;
    TORCH_CHECK((B[l].dim() == 2 || (B[l].dim() == 3 && B[l].size(0) == x[l].size(0))) &&
                    B[l].size(-2) == delta[l].size(2) && B[l].size(-1) == A[l].size(-2),
                "lora_grad: B must be [d_out, r] or [P, d_out, r]");
  }
  for (at::TensorList list : {x, delta, A, B}) check_alike(op, x[0], list);
}

// The tensor in the accumulation type.
at::Tensor wide(const at::Tensor& tensor) { return tensor.to(glue::result_options(tensor).dtype()); }

// A [r, d_in] if all groups share it, also if it was expanded to [P, r, d_in]; otherwise A itself.
at::Tensor shared_or_per_group(const at::Tensor& A) {
  return A.dim() == 3 && A.size(0) > 0 && A.stride(0) == 0 ? A.select(0, 0) : A;
}

// x A^T [..., N, r]
at::Tensor project(const at::Tensor& x, const at::Tensor& A) {
  return A.dim() == 2 ? at::linear(x, A) : at::matmul(x, A.mT());
}

// result = scale a b + beta result
void add_product(at::Tensor result, const at::Tensor& a, const at::Tensor& b, double scale, double beta) {
  result.baddbmm_(a, b, beta, scale);
}

// scale a b for a [P, i, k] and b [P, k, j]
at::Tensor scaled_product(const at::Tensor& a, const at::Tensor& b, double scale) {
  at::Tensor result = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  add_product(result, a, b, scale, 0);
  return result;
}

// u^T = A x^T [P, r, N], group by group, which is faster than one product of all groups' tokens. For A [r, d_in] or
// [P, r, d_in]. For ranks 10 to 15, and for rows of 512 or more numbers also for ranks 8 (PEFT's default) and 9, the
// product that writes u^T is faster than the one that writes u, by up to a third; elsewhere it is mostly slower.
at::Tensor projected_rows(const at::Tensor& x, const at::Tensor& any_A) {
  const at::Tensor A = any_A.dim() == 2 ? any_A.expand({x.size(0), any_A.size(0), any_A.size(1)}) : any_A;
  const int64_t rank = A.size(1), first = A.size(2) >= 512 ? 8 : 10;
  return rank >= first && rank < 16 ? at::bmm(A, x.mT()) : at::bmm(x, A.mT()).mT();
}

// Computes (u^T delta)^T instead of delta^T u, so that the long rows of delta are read sequentially. Returns a
// transposed view, because a contiguous copy takes up to a third of the time and most callers copy the result anyway.
at::Tensor grad_B_of(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& any_A, double scale) {
  const at::Tensor A = wide(shared_or_per_group(any_A));
  if (x.scalar_type() == A.scalar_type()) {
    at::Tensor u = projected_rows(x, A);
    if (scale != 1) u.mul_(scale);
    return at::bmm(u, delta).mT();
  }
  // bfloat16 inputs are converted in chunks of small groups that stay in the L2 cache of the thread that multiplies
  // them. Where the library's products of bfloat16 are faster than this, they round u and the result to bfloat16.
  constexpr int64_t chunk_bytes = 1 << 20;
  const int64_t P = x.size(0), group_bytes = 4 * x.size(1) * (x.size(2) + delta.size(2));
  const int64_t chunk = std::max<int64_t>(1, chunk_bytes / std::max<int64_t>(1, group_bytes));
  const at::Tensor rows = at::empty({P, A.size(-2), delta.size(2)}, A.options());
  const auto convert_and_multiply = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // of this thread; the caller's does not reach it
    for (int64_t first = begin; first < end; first += chunk) {
      const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, std::min(chunk, end - first)); };
      const at::Tensor u = projected_rows(wide(part(x)), A.dim() == 2 ? A : part(A));
      add_product(part(rows), u, wide(part(delta)), scale, 0);
    }
  };
  if (P >= at::get_num_threads())
    at::parallel_for(0, P, 1, convert_and_multiply);
  else
    convert_and_multiply(0, P);  // each product then uses all threads
  return rows.mT();
}

Tensors grad_A_of(at::TensorList x, at::TensorList delta, at::TensorList B, at::ArrayRef<double> scales) {
  Tensors found;
  for (size_t l = 0; l < B.size(); ++l)
    found.push_back(scaled_product(at::matmul(wide(delta[l]), wide(B[l])).mT(), wide(x[l]), scales[l]));
  return found;
}

std::tuple<Tensors, Tensors> lora_grad_on_cpu(at::TensorList x, at::TensorList delta, at::TensorList A,
                                              at::TensorList B, at::ArrayRef<double> scales) {
  check_lora_grad(x, delta, A, B, scales);
  glue::dtype_of("lora_grad", x[0]);
  Tensors grad_B;
  for (size_t l = 0; l < x.size(); ++l) grad_B.push_back(grad_B_of(x[l], delta[l], A[l], scales[l]));
  return {grad_A_of(x, delta, B, scales), grad_B};
}

// d(delta^T u) = ddelta^T u + delta^T du, with u = x A^T [P, N, r] and du = dx A^T [K, P, N, r]; a transposed view
at::Tensor tangent_of(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& dx, const at::Tensor& ddelta,
                      const at::Tensor& any_A, double scale) {
  const at::Tensor A = wide(shared_or_per_group(any_A));
  const int64_t P = x.size(0), K = dx.size(0), N = x.size(1), d_out = delta.size(2), rank = A.size(-2);
  const at::Tensor u = project(wide(x), A), du = project(wide(dx), A);
  // All directions of a group multiply the same delta, so they form one product with K r rows.
  const at::Tensor rows = du.permute({1, 0, 3, 2}).reshape({P, K * rank, N});
  at::Tensor result = scaled_product(rows, wide(delta), scale).view({P, K, rank, d_out}).transpose(0, 1);
  result = result.reshape({K * P, rank, d_out});  // copies if there are several groups
  const at::Tensor all_u = u.mT().expand({K, P, rank, N}).reshape({K * P, rank, N});
  add_product(result, all_u, wide(ddelta).reshape({K * P, N, d_out}), scale, 1);
  return result.view({K, P, rank, d_out}).mT();
}

void check_lora_grad_tangent(at::TensorList x, at::TensorList delta, at::TensorList dx, at::TensorList ddelta,
                             at::TensorList A, at::ArrayRef<double> scales) {
  const char* op = "lora_grad_tangent";
  TORCH_CHECK(!x.empty() && x.size() == delta.size() && x.size() == dx.size() && x.size() == ddelta.size() &&
                  x.size() == A.size() && x.size() == scales.size(),
              "lora_grad_tangent: lists of one length are needed");
  for (at::TensorList list : {x, delta, dx, ddelta, A}) check_alike(op, x[0], list);
  for (size_t l = 0; l < x.size(); ++l) {
    check_layer(op, x[l], delta[l], A[l]);
    TORCH_CHECK(dx[l].dim() == 4 && dx[l].sizes().slice(1) == x[l].sizes(), op, ": dx must be [K, P, N, d_in]");
    TORCH_CHECK(
        ddelta[l].dim() == 4 && ddelta[l].sizes().slice(1) == delta[l].sizes() && ddelta[l].size(0) == dx[l].size(0),
        op, ": ddelta must be [K, P, N, d_out]");
  }
}

Tensors lora_grad_tangent_on_cpu(at::TensorList x, at::TensorList delta, at::TensorList dx, at::TensorList ddelta,
                                 at::TensorList A, at::ArrayRef<double> scales) {
  check_lora_grad_tangent(x, delta, dx, ddelta, A, scales);
  glue::dtype_of("lora_grad_tangent", x[0]);
  Tensors found;
  for (size_t l = 0; l < x.size(); ++l) found.push_back(tangent_of(x[l], delta[l], dx[l], ddelta[l], A[l], scales[l]));
  return found;
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("lora_grad", &lora_grad_on_cpu);
  library.impl("lora_grad_tangent", &lora_grad_tangent_on_cpu);
}

#ifdef R2F_WITH_CUDA
at::Tensor grad_B_on_cuda(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A, double scale) {
  return scaled_product(wide(delta).mT(), project(wide(x), wide(A)), scale);
}

// With one group, all directions multiply one and the same delta, which a batched product reads with stride 0. With
// several groups, all directions of a group form one product with K r columns.
at::Tensor tangent_on_cuda(const at::Tensor& x, const at::Tensor& any_delta, const at::Tensor& dx,
                           const at::Tensor& ddelta, const at::Tensor& any_A, double scale) {
  const at::Tensor A = wide(shared_or_per_group(any_A)), delta = wide(any_delta);
  const int64_t P = x.size(0), K = dx.size(0), N = x.size(1), d_out = delta.size(2), rank = A.size(-2);
  const at::Tensor u = project(wide(x), A), du = project(wide(dx), A);  // [P, N, r] and [K, P, N, r]
  const at::Tensor all_u = u.expand({K, P, N, rank}).reshape({K * P, N, rank});
  const at::Tensor result = scaled_product(wide(ddelta).reshape({K * P, N, d_out}).mT(), all_u, scale);
  if (P == 1) {
    add_product(result, delta.expand({K, N, d_out}).mT(), du.view({K, N, rank}), scale, 1);
  } else {
    const at::Tensor columns = du.permute({1, 2, 0, 3}).reshape({P, N, K * rank});
    const at::Tensor by_du = at::bmm(delta.mT(), columns).view({P, d_out, K, rank}).permute({2, 0, 1, 3});
    result.view({K, P, d_out, rank}).add_(by_du, scale);
  }
  return result.view({K, P, d_out, rank});
}

// With one or two layers of a large rank, the hand-written kernels have few warps, which wait for memory, and the
// library's products are faster. For the layers of a whole model the library needs many launches (both seen on an H100,
// no record).
bool library_wins(DType dtype, size_t layers, int64_t rank) {
  return layers <= 2 && dtype == DType::kFloat32 && rank > 8;
}

// grad_B [groups, d_out, r] of a layer, whose x, delta and A are contiguous and have as many groups or divide them.
LoraGradLayer describe(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& A, double scale,
                       int64_t groups) {
  LoraGradLayer layer;
  layer.groups = groups, layer.tokens = x.size(1), layer.d_in = x.size(2), layer.d_out = delta.size(2);
  layer.rank = A.size(-2), layer.scale = scale;
  layer.x_groups = x.size(0), layer.delta_groups = delta.size(0), layer.A_groups = A.dim() == 3 ? A.size(0) : 1;
  layer.x = x.const_data_ptr(), layer.delta = delta.const_data_ptr(), layer.A = A.const_data_ptr();
  return layer;
}

// Queues the kernels for all layers on the current stream. Their inputs may be freed afterwards.
void run_kernels(const char* op, const at::Tensor& like, DType dtype, const std::vector<LoraGradLayer>& layers) {
  if (layers.empty()) return;
  const auto count = static_cast<int64_t>(layers.size());
  const at::Tensor workspace =
      at::empty({lora_grad_cuda_workspace(dtype, layers.data(), count)}, glue::result_options(like));
  glue::check_launch(op, lora_grad_cuda(dtype, layers.data(), count, workspace.mutable_data_ptr<float>(),
                                        glue::current_stream(like.device())));
}

std::tuple<Tensors, Tensors> lora_grad_on_cuda(at::TensorList x, at::TensorList delta, at::TensorList A,
                                               at::TensorList B, at::ArrayRef<double> scales) {
  check_lora_grad(x, delta, A, B, scales);
  const DType dtype = glue::dtype_of("lora_grad", x[0]);
  const c10::DeviceGuard guard(x[0].device());
  Tensors grad_B, contiguous;  // `contiguous` keeps the inputs alive until the kernels are queued
  std::vector<LoraGradLayer> layers;
  for (size_t l = 0; l < x.size(); ++l) {
    const at::Tensor x_l = x[l].contiguous(), delta_l = delta[l].contiguous();
    const at::Tensor A_l = shared_or_per_group(A[l]).contiguous();
    LoraGradLayer layer = describe(x_l, delta_l, A_l, scales[l], x_l.size(0));
    if (library_wins(dtype, x.size(), layer.rank) || !lora_grad_cuda_takes(dtype, layer)) {
      grad_B.push_back(grad_B_on_cuda(x_l, delta_l, A_l, scales[l]));
      continue;
    }
    grad_B.push_back(at::empty({layer.groups, layer.d_out, layer.rank}, glue::result_options(x_l)));
    layer.grad_B = grad_B.back().mutable_data_ptr<float>();
    layers.push_back(layer);
    contiguous.insert(contiguous.end(), {x_l, delta_l, A_l});
  }
  run_kernels("lora_grad", x[0], dtype, layers);
  return {grad_A_of(x, delta, B, scales), grad_B};
}

// Group k P + p of a layer belongs to direction k of group p. The kernels first compute delta^T (dx A^T) of all layers,
// then add ddelta^T (x A^T); x, delta and A are those of group p in all directions.
Tensors lora_grad_tangent_on_cuda(at::TensorList x, at::TensorList delta, at::TensorList dx, at::TensorList ddelta,
                                  at::TensorList A, at::ArrayRef<double> scales) {
  check_lora_grad_tangent(x, delta, dx, ddelta, A, scales);
  const DType dtype = glue::dtype_of("lora_grad_tangent", x[0]);
  const c10::DeviceGuard guard(x[0].device());
  Tensors found, contiguous;  // `contiguous` keeps the inputs alive until the kernels are queued
  std::vector<LoraGradLayer> by_dx, by_ddelta;
  for (size_t l = 0; l < x.size(); ++l) {
    const at::Tensor x_l = x[l].contiguous(), delta_l = delta[l].contiguous();
    const at::Tensor dx_l = dx[l].flatten(0, 1).contiguous(), ddelta_l = ddelta[l].flatten(0, 1).contiguous();
    const at::Tensor A_l = shared_or_per_group(A[l]).contiguous();
    LoraGradLayer first = describe(dx_l, delta_l, A_l, scales[l], dx_l.size(0));
    LoraGradLayer second = describe(x_l, ddelta_l, A_l, scales[l], dx_l.size(0));
    if (!lora_grad_cuda_takes(dtype, first) || !lora_grad_cuda_takes(dtype, second)) {
      found.push_back(tangent_on_cuda(x[l], delta[l], dx[l], ddelta[l], A[l], scales[l]));
      continue;
    }
    found.push_back(at::empty({dx[l].size(0), x_l.size(0), first.d_out, first.rank}, glue::result_options(x_l)));
    first.grad_B = second.grad_B = found.back().mutable_data_ptr<float>();
    second.adds = true;
    by_dx.push_back(first), by_ddelta.push_back(second);
    contiguous.insert(contiguous.end(), {x_l, delta_l, dx_l, ddelta_l, A_l});
  }
  run_kernels("lora_grad_tangent", x[0], dtype, by_dx);
  run_kernels("lora_grad_tangent", x[0], dtype, by_ddelta);
  return found;
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("lora_grad", &lora_grad_on_cuda);
  library.impl("lora_grad_tangent", &lora_grad_tangent_on_cuda);
}
#endif

}  // namespace
}  // namespace r2f
