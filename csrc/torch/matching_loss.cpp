// torch.ops.r2f.matching_loss and its backward on compiled kernels. The schemas and their meaning are in r2f_ext/ops.
#include "kernels/matching_loss.h"

#include <torch/library.h>

#include <tuple>

#include "torch/matching.h"

namespace r2f {
namespace {

using namespace glue;

using Forward = std::tuple<at::Tensor, at::Tensor, Tensors, at::Tensor>;  // loss, sums, grad_candidate, grad_images
using Backward = std::tuple<Tensors, at::Tensor>;                         // grad_candidate, grad_images

// Contiguous inputs, and their description for the kernels.
struct Call {
  Tensors candidate, observed;
  std::vector<MatchingLayer> layers;
  Doubles weights;
  DType dtype;
  at::TensorOptions result;
  MatchingArgs args;
  Images images;
};

Call prepare(at::TensorList candidate, at::TensorList observed, at::ArrayRef<double> weights, std::string_view kind,
             const at::Tensor& images, bool isotropic) {
  TORCH_CHECK(!candidate.empty() && candidate.size() == observed.size() && candidate.size() == weights.size(),
              "matching_loss: as many candidate as observed tensors and weights, and at least one");
  Call call;
  const size_t count = candidate.size();
  const at::Tensor& first = candidate[0];
  TORCH_CHECK(first.dim() >= 1, "matching_loss: candidate tensors must be [T, ...]");
  const int64_t trials = first.size(0);
  call.dtype = dtype_of("matching_loss", first);
  call.result = result_options(first);
  call.weights = weights.vec();
  call.candidate.reserve(count), call.observed.reserve(count), call.layers.reserve(count);
  for (size_t l = 0; l < count; ++l) {
    const at::Tensor &c = candidate[l], &o = observed[l];
    TORCH_CHECK(c.dim() >= 1 && c.size(0) == trials && o.dim() == c.dim() && o.sizes().slice(1) == c.sizes().slice(1) &&
                    (o.size(0) == trials || o.size(0) == 1),
                "matching_loss: candidate tensors must be [T, ...], observed ones [T, ...] or [1, ...]");
    TORCH_CHECK(c.scalar_type() == first.scalar_type() && o.scalar_type() == first.scalar_type() &&
                    c.device() == first.device() && o.device() == first.device(),
                "matching_loss: one dtype and one device");
    call.candidate.push_back(c.contiguous()), call.observed.push_back(o.contiguous());
    MatchingLayer layer;
    layer.candidate = call.candidate[l].const_data_ptr(), layer.observed = call.observed[l].const_data_ptr();
    layer.observed_is_shared = o.size(0) == 1;
    layer.size = trials == 0 ? 0 : c.numel() / trials;
    call.layers.push_back(layer);
  }
  call.args = {call.layers.data(), call.weights.data(), static_cast<int64_t>(count), trials,
               matching_kind("matching_loss", kind)};
  call.images = prepare_images("matching_loss", images, trials, first.device(), isotropic);
  return call;
}

at::Tensor empty_sums(const Call& call) {
  return at::empty({call.args.count, call.args.trials, 4}, call.result.dtype(at::kDouble));
}

MatchingSums* data_of(const at::Tensor& sums) { return static_cast<MatchingSums*>(sums.mutable_data_ptr()); }

const MatchingSums* checked_sums(const Call& call, const at::Tensor& sums, const at::Tensor& grad_loss) {
  return glue::checked_sums("matching_loss", sums, grad_loss, call.args.count, call.args.trials, call.result.device());
}

// Allocates uninitialized gradients of the candidate and points the layers of `call` to them.
Tensors empty_gradients(Call& call) {
  Tensors gradients;
  gradients.reserve(call.candidate.size());
  for (size_t l = 0; l < call.candidate.size(); ++l) {
    gradients.push_back(at::empty(call.candidate[l].sizes(), call.result));
    call.layers[l].grad_candidate = data_or_null(gradients[l]);
  }
  return gradients;
}

// Processes the gradients' chunks and the images' planes in one parallel loop. Planes are grouped so that a group takes
// about as much work as a chunk, because every thread gets the same number of chunks and groups. A pixel costs about as
// much as four elements.
template <typename OfChunks, typename OfPlanes>
void parallel_over(const Call& call, const OfChunks& of_chunks, const OfPlanes& of_planes) {
  const TotalVariationArgs& images = call.images.args;
  const int64_t chunks = matching_chunks(call.args), planes = images.planes();
  const int64_t plane = std::max<int64_t>(images.height * images.width, 1);
  const int64_t group = std::max<int64_t>(call.args.trials * kMatchingChunk / (4 * plane), 1);
  at::parallel_for(0, chunks + (planes + group - 1) / group, 1, [&](int64_t first, int64_t last) {
    if (first < chunks) of_chunks(first, std::min(last, chunks));
    if (last > chunks)
      of_planes(std::max<int64_t>(first - chunks, 0) * group, std::min((last - chunks) * group, planes));
  });
}

// Gradients of the sum of all losses, for the layers for which matching_in_one_pass() is false.
void remaining_gradients(const Call& call, const MatchingSums* sums) {
  const size_t trials = static_cast<size_t>(call.args.trials);
  const Doubles ones(trials, 1.0);
  std::vector<MatchingCoefficients> all(call.layers.size() * trials), coefficients;
  matching_coefficients(call.args.kind, call.args.weights, call.args.count, call.args.trials, sums, ones.data(),
                        all.data());
  std::vector<MatchingLayer> layers;
  for (size_t l = 0; l < call.layers.size(); ++l) {
    if (matching_in_one_pass(call.args.kind, call.layers[l])) continue;
    layers.push_back(call.layers[l]);
    const auto row = all.begin() + static_cast<std::ptrdiff_t>(l * trials);
    coefficients.insert(coefficients.end(), row, row + static_cast<std::ptrdiff_t>(trials));
  }
  MatchingArgs rest = call.args;
  rest.layers = layers.data(), rest.count = static_cast<int64_t>(layers.size());
  at::parallel_for(0, matching_chunks(rest), 1, [&](int64_t first, int64_t last) {
    matching_loss_backward_cpu(call.dtype, rest, coefficients.data(), first, last);
  });
}

Forward forward_on_cpu(at::TensorList candidate, at::TensorList observed, at::ArrayRef<double> weights,
                       std::string_view kind, const at::Tensor& images, double tv_weight, bool isotropic,
                       bool with_gradients) {
  Call call = prepare(candidate, observed, weights, kind, images, isotropic);
  const MatchingArgs& args = call.args;
  const TotalVariationArgs& planes = call.images.args;
  const size_t trials = static_cast<size_t>(args.trials);
  Tensors grad_candidate = with_gradients ? empty_gradients(call) : Tensors();
  const at::Tensor grad_images =
      with_gradients ? empty_gradient(call.images) : at::empty({0}, result_options(call.images.pixels));
  const Doubles ones(trials, 1.0);
  std::vector<MatchingSums> chunk_sums(static_cast<size_t>(matching_chunks(args)) * trials);
  Doubles plane_values(static_cast<size_t>(planes.planes())), losses(trials);
  parallel_over(
      call,
      [&](int64_t first, int64_t last) {
        matching_chunk_sums_cpu(call.dtype, args, with_gradients, first, last, chunk_sums.data());
      },
      [&](int64_t first, int64_t last) {
        total_variation_cpu(call.images.dtype, planes, first, last, plane_values.data());
        if (with_gradients)
          total_variation_backward_cpu(call.images.dtype, planes, ones.data(), tv_weight,
                                       grad_images.mutable_data_ptr(), first, last);
      });
  const at::Tensor sums = empty_sums(call);
  matching_layer_sums_cpu(args, chunk_sums.data(), data_of(sums));
  matching_losses(args.kind, args.weights, args.count, args.trials, data_of(sums), losses.data());
  add_planes(planes, plane_values, tv_weight, losses.data());
  if (with_gradients) remaining_gradients(call, data_of(sums));
  return {from_doubles(losses, call.result), sums, std::move(grad_candidate), grad_images};
}

Backward backward_on_cpu(const at::Tensor& grad_loss, at::TensorList candidate, at::TensorList observed,
                         const at::Tensor& sums, at::ArrayRef<double> weights, std::string_view kind,
                         const at::Tensor& images, double tv_weight, bool isotropic) {
  Call call = prepare(candidate, observed, weights, kind, images, isotropic);
  const MatchingArgs& args = call.args;
  const MatchingSums* given = checked_sums(call, sums, grad_loss);
  const Doubles grads = to_doubles(grad_loss);
  std::vector<MatchingCoefficients> coefficients(static_cast<size_t>(args.count * args.trials));
  matching_coefficients(args.kind, args.weights, args.count, args.trials, given, grads.data(), coefficients.data());
  Tensors grad_candidate = empty_gradients(call);
  const at::Tensor grad_images = empty_gradient(call.images);
  parallel_over(
      call,
      [&](int64_t first, int64_t last) {
        matching_loss_backward_cpu(call.dtype, args, coefficients.data(), first, last);
      },
      [&](int64_t first, int64_t last) {
        total_variation_backward_cpu(call.images.dtype, call.images.args, grads.data(), tv_weight,
                                     grad_images.mutable_data_ptr(), first, last);
      });
  return {std::move(grad_candidate), grad_images};
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("matching_loss", &forward_on_cpu);
  library.impl("matching_loss_backward", &backward_on_cpu);
}

#ifdef R2F_WITH_CUDA
Backward run_backward_on_cuda(Call& call, TrialNumbers grads, const MatchingSums* sums, const at::Tensor& workspace) {
  Tensors grad_candidate = empty_gradients(call);
  const at::Tensor grad_images = empty_gradient(call.images);
  call.images.gradient = data_or_null(grad_images);
  const char* error = matching_gradients_cuda(call.dtype, call.args, 0, call.args.count, call.images, sums, grads,
                                              workspace.mutable_data_ptr(), current_stream(call.result.device()));
  check_launch("matching_loss", error);
  return {std::move(grad_candidate), grad_images};
}

Forward forward_on_cuda(at::TensorList candidate, at::TensorList observed, at::ArrayRef<double> weights,
                        std::string_view kind, const at::Tensor& images, double tv_weight, bool isotropic,
                        bool with_gradients) {
  TORCH_CHECK(!candidate.empty(), "matching_loss: at least one candidate tensor");
  const c10::DeviceGuard guard(candidate[0].device());
  Call call = prepare(candidate, observed, weights, kind, images, isotropic);
  call.images.weight = tv_weight;
  const at::Tensor loss = at::empty({call.args.trials}, call.result), sums = empty_sums(call);
  const at::Tensor memory = workspace_for(call.args, call.images);
  void *workspace = memory.mutable_data_ptr(), *stream = current_stream(sums.device());
  check_launch("matching_loss",
               matching_chunk_sums_cuda(call.dtype, call.args, 0, call.args.count, call.images, workspace, stream));
  check_launch("matching_loss", matching_losses_cuda(call.dtype, call.args, call.images, workspace, data_of(sums),
                                                     trial_numbers(loss), stream));
  if (!with_gradients) return {loss, sums, Tensors(), at::empty({0}, result_options(call.images.pixels))};
  auto [grad_candidate, grad_images] = run_backward_on_cuda(call, {nullptr, 0}, data_of(sums), memory);
  return {loss, sums, std::move(grad_candidate), grad_images};
}

Backward backward_on_cuda(const at::Tensor& grad_loss, at::TensorList candidate, at::TensorList observed,
                          const at::Tensor& sums, at::ArrayRef<double> weights, std::string_view kind,
                          const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!candidate.empty(), "matching_loss: at least one candidate tensor");
  const c10::DeviceGuard guard(candidate[0].device());
  Call call = prepare(candidate, observed, weights, kind, images, isotropic);
  call.images.weight = tv_weight;
  const MatchingSums* given = checked_sums(call, sums, grad_loss);
  const at::Tensor grads = grad_loss.to(call.result);
  return run_backward_on_cuda(call, trial_numbers(grads), given, workspace_for(call.args, call.images));
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("matching_loss", &forward_on_cuda);
  library.impl("matching_loss_backward", &backward_on_cuda);
}
#endif

}  // namespace
}  // namespace r2f
