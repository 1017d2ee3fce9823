// torch.ops.r2f.factored_matching_loss and its backward on CUDA. The schemas and their meaning are in r2f_ext/ops.
//
// The gradients G = delta^T x are written out and passed to the kernels of matching_loss. On a GPU, three ordinary
// matrix products per layer and a few launches for all layers take less time than the many small products and sums of
// the factored forms that the CPU uses (seen on an H100, no record). Only kScratch elements of G exist at a time:
// layers are processed in batches, and the backward writes G again instead of keeping it.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "kernels/matching_loss.h"
#include "torch/factored.h"

#ifdef R2F_WITH_CUDA
namespace r2f {
namespace {

using namespace glue;

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // loss, sums, saved (empty)
using Backward = std::tuple<Tensors, Tensors, at::Tensor>;       // grad_x, grad_delta, grad_images

constexpr const char* kName = "factored_matching_loss";
// Elements of G at a time, unless one layer has more: 512 MiB in float32.
constexpr int64_t kScratch = int64_t{1} << 27;

// The inputs in the accumulation type.
struct Call {
  Tensors x, delta, observed;  // [T, N, d_in], [T, N, d_out], [T, d_out, d_in] or [1, d_out, d_in]
  DType dtype;                 // the accumulation type
  MatchingKind kind;
  int64_t count, trials;
  at::TensorOptions result;
  Images images;
};

Call prepare(at::TensorList x, at::TensorList delta, at::TensorList observed, at::ArrayRef<double> weights,
             std::string_view kind, const at::Tensor& images, bool isotropic) {
  check_factored(x, delta, observed, weights);
  Call call;
  call.dtype = dtype_of(kName, x[0]) == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  call.kind = matching_kind(kName, kind);
  call.count = static_cast<int64_t>(x.size()), call.trials = x[0].size(0);
  call.result = result_options(x[0]);
  const auto wide = [&](at::TensorList tensors) {
    Tensors results;
    for (const at::Tensor& t : tensors) results.push_back(t.to(call.result.dtype().toScalarType()));
    return results;
  };
  call.x = wide(x), call.delta = wide(delta), call.observed = wide(observed);
  call.images = prepare_images(kName, images, call.trials, x[0].device(), isotropic);
  return call;
}

// The gradients of consecutive layers, written out.
struct Batch {
  int64_t first;
  Tensors candidate, observed;  // [T, d_out, d_in]; observed: or [1, d_out, d_in]
  std::vector<MatchingLayer> layers;
  MatchingArgs args;
};

void write_layer(const Call& call, size_t l, Batch& batch) {
  const at::Tensor candidate = at::bmm(call.delta[l].mT(), call.x[l]), observed = call.observed[l].contiguous();
  MatchingLayer layer;
  layer.candidate = candidate.const_data_ptr(), layer.observed = observed.const_data_ptr();
  layer.grad_candidate = data_or_null(candidate);
  layer.observed_is_shared = observed.size(0) == 1;
  layer.size = candidate.size(1) * candidate.size(2);
  batch.candidate.push_back(candidate), batch.observed.push_back(observed);
  batch.layers.push_back(layer);
}

// Calls work(batch) for one batch after another.
template <typename Work>
void for_batches(const Call& call, const Work& work) {
  const auto elements = [&](size_t l) { return call.trials * call.delta[l].size(2) * call.x[l].size(2); };
  for (size_t l = 0; l < call.x.size();) {
    Batch batch;
    batch.first = static_cast<int64_t>(l);
    int64_t size = 0;
    do {
      size += elements(l);
      write_layer(call, l++, batch);
    } while (l < call.x.size() && size + elements(l) <= kScratch);
    batch.args.layers = batch.layers.data(), batch.args.count = static_cast<int64_t>(batch.layers.size());
    batch.args.trials = call.trials;
    work(batch);
  }
}

Forward forward(at::TensorList x, at::TensorList delta, at::TensorList observed, at::ArrayRef<double> weights,
                std::string_view kind, const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  const c10::DeviceGuard guard(x[0].device());
  const Call call = prepare(x, delta, observed, weights, kind, images, isotropic);
  void* stream = current_stream(x[0].device());
  at::Tensor sums = at::empty({call.count, call.trials, 4}, call.result.dtype(at::kDouble));
  MatchingSums* data = static_cast<MatchingSums*>(sums.mutable_data_ptr());
  for_batches(call, [&](const Batch& batch) {
    const at::Tensor workspace = at::empty({matching_loss_cuda_workspace(batch.args)}, call.result.dtype(at::kByte));
    MatchingSums* own = data + batch.first * call.trials;
    check_launch(kName, matching_sums_cuda(call.dtype, batch.args, own, workspace.mutable_data_ptr(), stream));
  });
  const at::Tensor loss = at::empty({call.trials}, call.result), values = image_values_on_cuda(call.images);
  const at::Tensor workspace = doubles_on(sums.device(), call.count);
  const char* error =
      matching_losses_cuda(call.dtype, call.kind, weights.data(), call.count, call.trials, data, doubles(values),
                           tv_weight, loss.mutable_data_ptr(), doubles(workspace), stream);
  check_launch(kName, error);
  return {loss, std::move(sums), at::empty({0}, call.result)};
}

Backward backward(const at::Tensor& grad_loss, at::TensorList x, at::TensorList delta, at::TensorList observed,
                  const at::Tensor& sums, const at::Tensor&, at::ArrayRef<double> weights, std::string_view kind,
                  const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  const c10::DeviceGuard guard(x[0].device());
  const Call call = prepare(x, delta, observed, weights, kind, images, isotropic);
  void* stream = current_stream(x[0].device());
  const MatchingSums* data = checked_sums(kName, sums, grad_loss, call.count, call.trials, x[0].device());
  const at::Tensor grads = grad_loss.to(call.result).contiguous(), workspace = doubles_on(sums.device(), call.count);
  const at::Tensor factors = at::empty({call.count, call.trials, 2}, sums.options());
  MatchingCoefficients* coefficients = static_cast<MatchingCoefficients*>(factors.mutable_data_ptr());
  const char* error = matching_coefficients_cuda(call.dtype, call.kind, weights.data(), call.count, call.trials, data,
                                                 grads.const_data_ptr(), coefficients, doubles(workspace), stream);
  check_launch(kName, error);
  Tensors grad_x, grad_delta;
  for_batches(call, [&](const Batch& batch) {
    const MatchingCoefficients* own = coefficients + batch.first * call.trials;
    check_launch(kName, matching_gradients_cuda(call.dtype, batch.args, own, stream));
    for (size_t i = 0; i < batch.layers.size(); ++i) {  // the candidate holds dL/dG now
      const size_t l = static_cast<size_t>(batch.first) + i;
      grad_x.push_back(at::bmm(call.delta[l], batch.candidate[i]));
      grad_delta.push_back(at::bmm(call.x[l], batch.candidate[i].mT()));
    }
  });
  return {std::move(grad_x), std::move(grad_delta), image_gradient_on_cuda(call.images, grad_loss, tv_weight)};
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("factored_matching_loss", &forward);
  library.impl("factored_matching_loss_backward", &backward);
}

}  // namespace
}  // namespace r2f
#endif
