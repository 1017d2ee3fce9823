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

// The inputs in the accumulation type. Pointers in `layers` are set for the layers of one batch at a time.
struct Call {
  Tensors x, delta, observed;  // [T, N, d_in], [T, N, d_out], [T, d_out, d_in] or [1, d_out, d_in]
  DType dtype;                 // the accumulation type
  std::vector<MatchingLayer> layers;
  MatchingArgs args;
  at::TensorOptions result;
  Images images;
};

Call prepare(at::TensorList x, at::TensorList delta, at::TensorList observed, at::ArrayRef<double> weights,
             std::string_view kind, const at::Tensor& images, double tv_weight, bool isotropic) {
  check_factored(x, delta, observed, weights);
  Call call;
  call.dtype = dtype_of(kName, x[0]) == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  call.result = result_options(x[0]);
  const auto wide = [&](at::TensorList tensors) {
    Tensors results;
    for (const at::Tensor& t : tensors) results.push_back(t.to(call.result.dtype().toScalarType()));
    return results;
  };
  call.x = wide(x), call.delta = wide(delta), call.observed = wide(observed);
  for (size_t l = 0; l < x.size(); ++l) {
    MatchingLayer layer;
    layer.observed_is_shared = observed[l].size(0) == 1;
    layer.size = delta[l].size(2) * x[l].size(2);
    call.layers.push_back(layer);
  }
  call.args = {call.layers.data(), weights.data(), static_cast<int64_t>(x.size()), x[0].size(0),
               matching_kind(kName, kind)};
  call.images = prepare_images(kName, images, call.args.trials, x[0].device(), isotropic);
  call.images.weight = tv_weight;
  return call;
}

// The gradients of the layers first <= l < last, written out.
struct Batch {
  int64_t first, last;
  Tensors candidate, observed;  // [T, d_out, d_in]; observed: or [1, d_out, d_in]
};

void write_layer(Call& call, size_t l, Batch& batch) {
  const at::Tensor candidate = at::bmm(call.delta[l].mT(), call.x[l]), observed = call.observed[l].contiguous();
  MatchingLayer& layer = call.layers[l];
  layer.candidate = candidate.const_data_ptr(), layer.observed = observed.const_data_ptr();
  layer.grad_candidate = data_or_null(candidate);
  batch.candidate.push_back(candidate), batch.observed.push_back(observed);
}

// Calls work(batch) for one batch after another.
template <typename Work>
void for_batches(Call& call, const Work& work) {
  const auto elements = [&](size_t l) { return call.args.trials * call.layers[l].size; };
  for (size_t l = 0; l < call.layers.size();) {
    Batch batch;
    batch.first = static_cast<int64_t>(l);
    int64_t size = 0;
    do {
      size += elements(l);
      write_layer(call, l++, batch);
    } while (l < call.layers.size() && size + elements(l) <= kScratch);
    batch.last = static_cast<int64_t>(l);
    work(batch);
  }
}

Forward forward(at::TensorList x, at::TensorList delta, at::TensorList observed, at::ArrayRef<double> weights,
                std::string_view kind, const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  const c10::DeviceGuard guard(x[0].device());
  Call call = prepare(x, delta, observed, weights, kind, images, tv_weight, isotropic);
  const at::Tensor loss = at::empty({call.args.trials}, call.result);
  at::Tensor sums = at::empty({call.args.count, call.args.trials, 4}, call.result.dtype(at::kDouble));
  const at::Tensor memory = workspace_for(call.args, call.images);
  void *workspace = memory.mutable_data_ptr(), *stream = current_stream(x[0].device());
  for_batches(call, [&](const Batch& batch) {
    check_launch(kName, matching_chunk_sums_cuda(call.dtype, call.args, batch.first, batch.last, call.images, workspace,
                                                 stream));
  });
  check_launch(kName,
               matching_losses_cuda(call.dtype, call.args, call.images, workspace,
                                    static_cast<MatchingSums*>(sums.mutable_data_ptr()), trial_numbers(loss), stream));
  return {loss, std::move(sums), at::empty({0}, call.result)};
}

Backward backward(const at::Tensor& grad_loss, at::TensorList x, at::TensorList delta, at::TensorList observed,
                  const at::Tensor& sums, const at::Tensor&, at::ArrayRef<double> weights, std::string_view kind,
                  const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  const c10::DeviceGuard guard(x[0].device());
  Call call = prepare(x, delta, observed, weights, kind, images, tv_weight, isotropic);
  const MatchingSums* data = checked_sums(kName, sums, grad_loss, call.args.count, call.args.trials, x[0].device());
  const at::Tensor grads = grad_loss.to(call.result), grad_images = empty_gradient(call.images);
  call.images.gradient = data_or_null(grad_images);
  const at::Tensor memory = workspace_for(call.args, call.images);
  void *workspace = memory.mutable_data_ptr(), *stream = current_stream(x[0].device());
  Tensors grad_x, grad_delta;
  for_batches(call, [&](const Batch& batch) {
    check_launch(kName, matching_gradients_cuda(call.dtype, call.args, batch.first, batch.last, call.images, data,
                                                trial_numbers(grads), workspace, stream));
    for (size_t i = 0; i < batch.candidate.size(); ++i) {  // the candidate holds dL/dG now
      const size_t l = static_cast<size_t>(batch.first) + i;
      grad_x.push_back(at::bmm(call.delta[l], batch.candidate[i]));
      grad_delta.push_back(at::bmm(call.x[l], batch.candidate[i].mT()));
    }
  });
  return {std::move(grad_x), std::move(grad_delta), grad_images};
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("factored_matching_loss", &forward);
  library.impl("factored_matching_loss_backward", &backward);
}

}  // namespace
}  // namespace r2f
#endif
