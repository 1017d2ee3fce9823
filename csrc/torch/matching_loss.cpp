// torch.ops.r2f.matching_loss, its backward, and both of total_variation, which is a part of it, on compiled kernels.
// The schemas and the meaning are in r2f_ext/ops.
#include "kernels/matching_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels/total_variation.h"
#include "torch/glue.h"
#include "torch/matching_kind.h"
#include "torch/matching_loss.h"

namespace r2f {
namespace {

using Tensors = std::vector<at::Tensor>;

// Contiguous inputs, and the plain description of them that the kernels take.
struct Lists {
  Tensors candidate, observed;
  std::vector<MatchingLayer> layers;
  std::vector<double> weights;
  DType dtype;
  at::TensorOptions result;
  MatchingArgs args;
};

Lists prepare(at::TensorList candidate, at::TensorList observed, at::ArrayRef<double> weights, std::string_view kind) {
  TORCH_CHECK(!candidate.empty() && candidate.size() == observed.size() && candidate.size() == weights.size(),
              "matching_loss: as many candidate as observed tensors and weights, and at least one");
  Lists lists;
  const size_t count = candidate.size();
  const at::Tensor& first = candidate[0];
  TORCH_CHECK(first.dim() >= 1, "matching_loss: candidate tensors must be [T, ...]");
  const int64_t trials = first.size(0);
  lists.dtype = glue::dtype_of("matching_loss", first);
  lists.result = glue::result_options(first);
  lists.weights = weights.vec();
  lists.candidate.reserve(count), lists.observed.reserve(count), lists.layers.reserve(count);
  for (size_t l = 0; l < count; ++l) {
    const at::Tensor &c = candidate[l], &o = observed[l];
    TORCH_CHECK(c.dim() >= 1 && c.size(0) == trials && o.dim() == c.dim() && o.sizes().slice(1) == c.sizes().slice(1) &&
                    (o.size(0) == trials || o.size(0) == 1),
                "matching_loss: candidate tensors must be [T, ...], observed ones [T, ...] or [1, ...]");
    TORCH_CHECK(c.scalar_type() == first.scalar_type() && o.scalar_type() == first.scalar_type() &&
                    c.device() == first.device() && o.device() == first.device(),
                "matching_loss: one dtype and one device");
    lists.candidate.push_back(c.contiguous()), lists.observed.push_back(o.contiguous());
    MatchingLayer layer;
    layer.candidate = lists.candidate[l].const_data_ptr(), layer.observed = lists.observed[l].const_data_ptr();
    layer.observed_is_shared = o.size(0) == 1;
    layer.size = trials == 0 ? 0 : c.numel() / trials;
    lists.layers.push_back(layer);
  }
  lists.args = {lists.layers.data(), lists.weights.data(), static_cast<int64_t>(count), trials,
                glue::matching_kind("matching_loss", kind)};
  return lists;
}

// Contiguous images and their description.
struct Images {
  at::Tensor pixels;
  DType dtype;
  TotalVariationArgs args;
};

Images prepare(const char* op, const at::Tensor& images, bool isotropic) {
  TORCH_CHECK(images.dim() == 4, op, ": images must be [T, c, h, w]");
  Images call{images.contiguous(), glue::dtype_of(op, images), {}};
  call.args = {call.pixels.const_data_ptr(), images.size(0), images.size(1), images.size(2), images.size(3), isotropic};
  return call;
}

std::optional<Images> prepare(const Lists& lists, const std::optional<at::Tensor>& images, bool isotropic) {
  if (!images.has_value()) return std::nullopt;
  Images call = prepare("matching_loss", *images, isotropic);
  TORCH_CHECK(call.args.trials == lists.args.trials,
              "matching_loss: images must be [T, c, h, w] with the candidate's T");
  TORCH_CHECK(call.pixels.device() == lists.result.device(), "matching_loss: one device");
  return call;
}

at::Tensor sums_tensor(const Lists& lists) {
  return at::empty({lists.args.count, lists.args.trials, 4}, lists.result.dtype(at::kDouble));
}

MatchingSums* sums_of(const at::Tensor& sums) { return static_cast<MatchingSums*>(sums.mutable_data_ptr()); }

const MatchingSums* checked_sums(const Lists& lists, const at::Tensor& sums, const at::Tensor& grad_loss) {
  TORCH_CHECK(sums.is_contiguous() && sums.scalar_type() == at::kDouble && sums.device() == lists.result.device() &&
                  sums.sizes() == at::IntArrayRef({lists.args.count, lists.args.trials, 4}),
              "matching_loss: sums must be what the forward returned");
  TORCH_CHECK(grad_loss.sizes() == at::IntArrayRef({lists.args.trials}) && grad_loss.device() == sums.device(),
              "matching_loss: grad_loss must be [T]");
  return static_cast<const MatchingSums*>(sums.const_data_ptr());
}

Tensors gradients_of(Lists& lists, const Tensors& inputs, void* MatchingLayer::* place) {
  Tensors gradients;
  gradients.reserve(inputs.size());
  // Without trials nobody writes the gradient of what all trials share.
  for (size_t l = 0; l < inputs.size(); ++l) {
    gradients.push_back(lists.args.trials == 0 ? at::zeros(inputs[l].sizes(), lists.result)
                                               : at::empty(inputs[l].sizes(), lists.result));
    lists.layers[l].*place = glue::data_or_null(gradients[l]);
  }
  return gradients;
}

at::Tensor gradient_of(const Lists& lists, const std::optional<Images>& images) {
  return images ? at::empty(images->pixels.sizes(), glue::result_options(images->pixels))
                : at::empty({0}, lists.result);
}

// [T] numbers of any float dtype on the CPU, as float64.
std::vector<double> to_doubles(const at::Tensor& numbers) {
  const at::Tensor wide = numbers.to(at::kDouble).contiguous();
  const double* data = static_cast<const double*>(wide.const_data_ptr());
  return {data, data + wide.numel()};
}

at::Tensor from_doubles(const std::vector<double>& numbers, at::TensorOptions options) {
  const at::Tensor result = at::empty({static_cast<int64_t>(numbers.size())}, options);
  if (options.dtype() == at::kDouble)
    std::copy(numbers.begin(), numbers.end(), static_cast<double*>(result.mutable_data_ptr()));
  else
    std::copy(numbers.begin(), numbers.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

// losses[t] += weight * the values of its planes
void add_planes(const TotalVariationArgs& args, const std::vector<double>& of_planes, double weight, double* losses) {
  for (int64_t plane = 0; plane < args.planes(); ++plane)
    losses[plane / args.channels] += weight * of_planes[static_cast<size_t>(plane)];
}

// The pieces of the lists and the planes of the images in one round of the thread pool. As many planes count as one as
// are about as much work as a piece: threads get equal numbers. A pixel costs about as much as four numbers.
template <typename OfPieces, typename OfPlanes>
void parallel_over(const MatchingArgs& args, const std::optional<Images>& pixels, const OfPieces& of_pieces,
                   const OfPlanes& of_planes) {
  const int64_t pieces = matching_pieces(args), planes = pixels ? pixels->args.planes() : 0;
  const int64_t plane = pixels ? std::max<int64_t>(pixels->args.height * pixels->args.width, 1) : 1;
  const int64_t together = std::max<int64_t>(args.trials * kMatchingPiece / (4 * plane), 1);
  at::parallel_for(0, pieces + (planes + together - 1) / together, 1, [&](int64_t first, int64_t last) {
    if (first < pieces) of_pieces(first, std::min(last, pieces));
    if (last > pieces)
      of_planes(std::max<int64_t>(first - pieces, 0) * together, std::min((last - pieces) * together, planes));
  });
}

// The losses and the sums; into `grad_images` and where `lists` says, the gradients that come with them. Null: none.
std::tuple<at::Tensor, at::Tensor> run_forward(const Lists& lists, const std::optional<Images>& pixels,
                                               double tv_weight, const at::Tensor* grad_images) {
  const MatchingArgs& args = lists.args;
  const size_t trials = static_cast<size_t>(args.trials);
  const std::vector<double> ones(trials, 1.0);
  std::vector<MatchingSums> of_pieces(static_cast<size_t>(matching_pieces(args)) * trials);
  std::vector<double> of_planes(pixels ? static_cast<size_t>(pixels->args.planes()) : 0), losses(trials);
  parallel_over(
      args, pixels,
      [&](int64_t first, int64_t last) {
        matching_piece_sums_cpu(lists.dtype, args, grad_images != nullptr, first, last, of_pieces.data());
      },
      [&](int64_t first, int64_t last) {
        total_variation_cpu(pixels->dtype, pixels->args, first, last, of_planes.data());
        if (grad_images != nullptr)
          total_variation_backward_cpu(pixels->dtype, pixels->args, ones.data(), tv_weight,
                                       grad_images->mutable_data_ptr(), first, last);
      });
  const at::Tensor sums = sums_tensor(lists);
  matching_finish_cpu(args, of_pieces.data(), sums_of(sums), losses.data());
  if (pixels) add_planes(pixels->args, of_planes, tv_weight, losses.data());
  return {from_doubles(losses, lists.result), sums};
}

std::tuple<at::Tensor, at::Tensor> forward_on_cpu(at::TensorList candidate, at::TensorList observed,
                                                  at::ArrayRef<double> weights, std::string_view kind,
                                                  const std::optional<at::Tensor>& images, double tv_weight,
                                                  bool isotropic) {
  const Lists lists = prepare(candidate, observed, weights, kind);
  return run_forward(lists, prepare(lists, images, isotropic), tv_weight, nullptr);
}

std::tuple<Tensors, Tensors, at::Tensor> backward_on_cpu(const at::Tensor& grad_loss, at::TensorList candidate,
                                                         at::TensorList observed, const at::Tensor& sums,
                                                         at::ArrayRef<double> weights, std::string_view kind,
                                                         const std::optional<at::Tensor>& images, double tv_weight,
                                                         bool isotropic, bool to_observed) {
  Lists lists = prepare(candidate, observed, weights, kind);
  const MatchingArgs& args = lists.args;
  const std::optional<Images> pixels = prepare(lists, images, isotropic);
  const MatchingSums* given = checked_sums(lists, sums, grad_loss);
  const std::vector<double> grads = to_doubles(grad_loss);
  std::vector<MatchingCoefficients> coefficients(static_cast<size_t>(args.count * args.trials));
  matching_coefficients(args.kind, args.weights, args.count, args.trials, given, grads.data(), coefficients.data());
  Tensors grad_candidate = gradients_of(lists, lists.candidate, &MatchingLayer::grad_candidate), grad_observed;
  if (to_observed) grad_observed = gradients_of(lists, lists.observed, &MatchingLayer::grad_observed);
  const at::Tensor grad_images = gradient_of(lists, pixels);
  parallel_over(
      args, pixels,
      [&](int64_t first, int64_t last) {
        matching_loss_backward_cpu(lists.dtype, args, coefficients.data(), first, last);
      },
      [&](int64_t first, int64_t last) {
        total_variation_backward_cpu(pixels->dtype, pixels->args, grads.data(), tv_weight,
                                     grad_images.mutable_data_ptr(), first, last);
      });
  return {std::move(grad_candidate), std::move(grad_observed), grad_images};
}

}  // namespace

MatchingBothWays matching_loss_both_ways_on_cpu(at::TensorList candidate, at::TensorList observed,
                                                at::ArrayRef<double> weights, std::string_view kind,
                                                const std::optional<at::Tensor>& images, double tv_weight,
                                                bool isotropic) {
  Lists lists = prepare(candidate, observed, weights, kind);
  const MatchingArgs& args = lists.args;
  const std::optional<Images> pixels = prepare(lists, images, isotropic);
  MatchingBothWays result;
  result.grad_candidate = gradients_of(lists, lists.candidate, &MatchingLayer::grad_candidate);
  result.grad_images = gradient_of(lists, pixels);
  std::tie(result.loss, result.sums) = run_forward(lists, pixels, tv_weight, &result.grad_images);

  // What could not be had together.
  const size_t trials = static_cast<size_t>(args.trials);
  const std::vector<double> ones(trials, 1.0);
  std::vector<MatchingCoefficients> coefficients(static_cast<size_t>(args.count) * trials);
  matching_coefficients(args.kind, args.weights, args.count, args.trials, sums_of(result.sums), ones.data(),
                        coefficients.data());
  std::vector<MatchingLayer> layers;
  std::vector<MatchingCoefficients> theirs;
  for (size_t l = 0; l < lists.layers.size(); ++l) {
    if (matching_together(args.kind, lists.layers[l])) continue;
    layers.push_back(lists.layers[l]);
    const auto row = coefficients.begin() + static_cast<std::ptrdiff_t>(l * trials);
    theirs.insert(theirs.end(), row, row + static_cast<std::ptrdiff_t>(trials));
  }
  MatchingArgs rest = args;
  rest.layers = layers.data(), rest.count = static_cast<int64_t>(layers.size());
  at::parallel_for(0, matching_pieces(rest), 1, [&](int64_t first, int64_t last) {
    matching_loss_backward_cpu(lists.dtype, rest, theirs.data(), first, last);
  });
  return result;
}

namespace {

at::Tensor variation_on_cpu(const at::Tensor& images, bool isotropic) {
  const Images call = prepare("total_variation", images, isotropic);
  std::vector<double> of_planes(static_cast<size_t>(call.args.planes())), values(static_cast<size_t>(images.size(0)));
  at::parallel_for(0, call.args.planes(), 1, [&](int64_t first, int64_t last) {
    total_variation_cpu(call.dtype, call.args, first, last, of_planes.data());
  });
  add_planes(call.args, of_planes, 1, values.data());
  return from_doubles(values, glue::result_options(images));
}

at::Tensor variation_backward_on_cpu(const at::Tensor& grad, const at::Tensor& images, bool isotropic) {
  const Images call = prepare("total_variation", images, isotropic);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({images.size(0)}), "total_variation: grad must be [T]");
  const std::vector<double> grads = to_doubles(grad);
  const at::Tensor result = at::empty(images.sizes(), glue::result_options(images));
  at::parallel_for(0, call.args.planes(), 1, [&](int64_t first, int64_t last) {
    total_variation_backward_cpu(call.dtype, call.args, grads.data(), 1, result.mutable_data_ptr(), first, last);
  });
  return result;
}

#ifdef R2F_WITH_CUDA
at::Tensor doubles_on(const at::Tensor& like, int64_t size) {
  return at::empty({size}, like.options().dtype(at::kDouble));
}

at::Tensor workspace_for(const Lists& lists) {
  return at::empty({matching_loss_cuda_workspace(lists.args)}, lists.result.dtype(at::kByte));
}

double* doubles(const at::Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

// Values [T], float64.
at::Tensor variation_values(const Images& call) {
  const at::Tensor values = doubles_on(call.pixels, call.args.trials);
  const at::Tensor workspace = doubles_on(call.pixels, total_variation_cuda_workspace(call.args));
  const char* error = total_variation_cuda(call.dtype, call.args, doubles(values), doubles(workspace),
                                           glue::current_stream(call.pixels.device()));
  glue::check_launch("total_variation", error);
  return values;
}

// grads: [T] of the images' accumulation type
at::Tensor variation_gradient(const Images& call, const at::Tensor& grads, double weight) {
  const at::TensorOptions options = glue::result_options(call.pixels);
  const at::Tensor result = at::empty(call.pixels.sizes(), options), own = grads.to(options).contiguous();
  const char* error =
      total_variation_backward_cuda(call.dtype, call.args, own.const_data_ptr(), weight, result.mutable_data_ptr(),
                                    glue::current_stream(call.pixels.device()));
  glue::check_launch("total_variation", error);
  return result;
}

std::tuple<at::Tensor, at::Tensor> forward_on_cuda(at::TensorList candidate, at::TensorList observed,
                                                   at::ArrayRef<double> weights, std::string_view kind,
                                                   const std::optional<at::Tensor>& images, double tv_weight,
                                                   bool isotropic) {
  TORCH_CHECK(!candidate.empty(), "matching_loss: at least one candidate tensor");
  const c10::DeviceGuard guard(candidate[0].device());
  const Lists lists = prepare(candidate, observed, weights, kind);
  const std::optional<Images> pixels = prepare(lists, images, isotropic);
  const at::Tensor values = pixels ? variation_values(*pixels) : at::Tensor();
  const at::Tensor sums = sums_tensor(lists), loss = at::empty({lists.args.trials}, lists.result);
  const at::Tensor workspace = workspace_for(lists);
  const char* error =
      matching_loss_cuda(lists.dtype, lists.args, pixels ? doubles(values) : nullptr, tv_weight, sums_of(sums),
                         loss.mutable_data_ptr(), workspace.mutable_data_ptr(), glue::current_stream(sums.device()));
  glue::check_launch("matching_loss", error);
  return {loss, sums};
}

std::tuple<Tensors, Tensors, at::Tensor> backward_on_cuda(const at::Tensor& grad_loss, at::TensorList candidate,
                                                          at::TensorList observed, const at::Tensor& sums,
                                                          at::ArrayRef<double> weights, std::string_view kind,
                                                          const std::optional<at::Tensor>& images, double tv_weight,
                                                          bool isotropic, bool to_observed) {
  TORCH_CHECK(!candidate.empty(), "matching_loss: at least one candidate tensor");
  const c10::DeviceGuard guard(candidate[0].device());
  Lists lists = prepare(candidate, observed, weights, kind);
  const std::optional<Images> pixels = prepare(lists, images, isotropic);
  const MatchingSums* given = checked_sums(lists, sums, grad_loss);
  Tensors grad_candidate = gradients_of(lists, lists.candidate, &MatchingLayer::grad_candidate), grad_observed;
  if (to_observed) grad_observed = gradients_of(lists, lists.observed, &MatchingLayer::grad_observed);
  const at::Tensor workspace = workspace_for(lists), grads = grad_loss.to(lists.result).contiguous();
  const char* error = matching_loss_backward_cuda(lists.dtype, lists.args, grads.const_data_ptr(), given,
                                                  workspace.mutable_data_ptr(), glue::current_stream(sums.device()));
  glue::check_launch("matching_loss", error);
  const at::Tensor grad_images =
      pixels ? variation_gradient(*pixels, grad_loss, tv_weight) : at::empty({0}, lists.result);
  return {std::move(grad_candidate), std::move(grad_observed), grad_images};
}

at::Tensor variation_on_cuda(const at::Tensor& images, bool isotropic) {
  const c10::DeviceGuard guard(images.device());
  return variation_values(prepare("total_variation", images, isotropic)).to(glue::result_options(images).dtype());
}

at::Tensor variation_backward_on_cuda(const at::Tensor& grad, const at::Tensor& images, bool isotropic) {
  const c10::DeviceGuard guard(images.device());
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({images.size(0)}), "total_variation: grad must be [T]");
  return variation_gradient(prepare("total_variation", images, isotropic), grad, 1);
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("matching_loss", &forward_on_cuda);
  library.impl("matching_loss_backward", &backward_on_cuda);
  library.impl("total_variation", &variation_on_cuda);
  library.impl("total_variation_backward", &variation_backward_on_cuda);
}
#endif

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("matching_loss", &forward_on_cpu);
  library.impl("matching_loss_backward", &backward_on_cpu);
  library.impl("total_variation", &variation_on_cpu);
  library.impl("total_variation_backward", &variation_backward_on_cpu);
}

}  // namespace
}  // namespace r2f
