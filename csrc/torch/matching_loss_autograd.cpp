// How autograd goes through torch.ops.r2f.matching_loss where the kernels are compiled; elsewhere ops/matching_loss.py
// says it. In C++, since for lists of tensors a Python Function costs as much as the kernels.
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "torch/matching_loss.h"

namespace r2f {
namespace {

using torch::autograd::AutogradContext;
using Tensors = std::vector<at::Tensor>;
using Forward = std::tuple<at::Tensor, at::Tensor>(at::TensorList, at::TensorList, at::ArrayRef<double>,
                                                   std::string_view, const std::optional<at::Tensor>&, double, bool);
using Backward = std::tuple<Tensors, Tensors, at::Tensor>(const at::Tensor&, at::TensorList, at::TensorList,
                                                          const at::Tensor&, at::ArrayRef<double>, std::string_view,
                                                          const std::optional<at::Tensor>&, double, bool, bool);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Settings {
  at::ArrayRef<double> weights;
  std::string_view kind;
  double tv_weight;
  bool isotropic;
};

// Neighbours in the list of inputs: candidate, observed, images; what follows them are no tensors.
constexpr size_t kNoTensors = 3;

struct MatchingLoss : torch::autograd::Function<MatchingLoss> {
  static at::Tensor forward(AutogradContext* ctx, at::TensorList candidate, at::TensorList observed,
                            const std::optional<at::Tensor>& images, const Settings& settings, bool both_ways,
                            at::Tensor* sums) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor loss;
    if (both_ways) {
      MatchingBothWays results = matching_loss_both_ways_on_cpu(candidate, observed, settings.weights, settings.kind,
                                                                images, settings.tv_weight, settings.isotropic);
      loss = results.loss, *sums = results.sums;
      Tensors gradients = as_inputs(std::move(results.grad_candidate), candidate);
      gradients.resize(2 * candidate.size());
      gradients.push_back(images.has_value() ? results.grad_images.to(images->scalar_type()) : at::Tensor());
      ctx->saved_data["gradients"] = std::move(gradients);
    } else {
      static const auto forward = find<Forward>("r2f::matching_loss");
      std::tie(loss, *sums) = forward.call(candidate, observed, settings.weights, settings.kind, images,
                                           settings.tv_weight, settings.isotropic);
    }
    Tensors saved;
    saved.reserve(candidate.size() + observed.size() + 2);
    saved.insert(saved.end(), candidate.begin(), candidate.end());
    saved.insert(saved.end(), observed.begin(), observed.end());
    saved.push_back(images.value_or(at::Tensor()));
    saved.push_back(*sums);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["weights"] = settings.weights.vec();
    ctx->saved_data["kind"] = std::string(settings.kind);
    ctx->saved_data["tv_weight"] = settings.tv_weight;
    ctx->saved_data["isotropic"] = settings.isotropic;
    return loss;
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    Tensors result = gradients_of_the_forward(ctx, grads[0]);
    if (result.empty()) result = gradients(ctx, grads[0]);
    result.resize(result.size() + kNoTensors);
    return result;
  }

 private:
  // Once, and where the losses' gradients are 1; else nothing.
  static Tensors gradients_of_the_forward(AutogradContext* ctx, const at::Tensor& grad_loss) {
    const auto found = ctx->saved_data.find("gradients");
    if (found == ctx->saved_data.end() || at::GradMode::is_enabled()) return {};
    const at::Tensor grads = grad_loss.to(at::kDouble).contiguous();
    const double* first = grads.const_data_ptr<double>();
    if (!std::all_of(first, first + grads.numel(), [](double grad) { return grad == 1; })) return {};
    Tensors gradients = found->second.toTensorVector();
    ctx->saved_data.erase(found);
    return gradients;
  }

  static Tensors gradients(AutogradContext* ctx, const at::Tensor& grad_loss) {
    const Tensors saved = ctx->get_saved_variables();
    const size_t count = (saved.size() - 2) / 2;
    const at::TensorList all(saved), candidate = all.slice(0, count), observed = all.slice(count, count);
    const at::Tensor &images = saved[2 * count], &sums = saved[2 * count + 1];
    const bool to_observed = ctx->needs_input_grad({torch::autograd::IndexRange{count, 2 * count}});
    static const auto backward = find<Backward>("r2f::matching_loss_backward");
    // Where a graph of the gradient is wanted, autograd has another way (ops/matching_loss.py).
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    auto [result, grad_observed, grad_images] =
        backward.call(grad_loss, candidate, observed, sums, ctx->saved_data["weights"].toDoubleVector(),
                      ctx->saved_data["kind"].toStringView(), images.defined() ? std::optional(images) : std::nullopt,
                      ctx->saved_data["tv_weight"].toDouble(), ctx->saved_data["isotropic"].toBool(), to_observed);
    result.insert(result.end(), grad_observed.begin(), grad_observed.end());
    result = as_inputs(std::move(result), all);
    result.resize(2 * count);
    result.push_back(images.defined() ? grad_images.to(images.scalar_type()) : at::Tensor());
    return result;
  }

  // Gradients in the dtypes of what they belong to.
  static Tensors as_inputs(Tensors gradients, at::TensorList inputs) {
    for (size_t l = 0; l < gradients.size(); ++l) gradients[l] = gradients[l].to(inputs[l].scalar_type());
    return gradients;
  }
};

bool requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.requires_grad(); });
}

std::tuple<at::Tensor, at::Tensor> matching_loss(at::TensorList candidate, at::TensorList observed,
                                                 at::ArrayRef<double> weights, std::string_view kind,
                                                 const std::optional<at::Tensor>& images, double tv_weight,
                                                 bool isotropic) {
  const bool both_ways = at::GradMode::is_enabled() && requires_grad(candidate) && !requires_grad(observed) &&
                         candidate[0].is_cpu() && !at::areAnyTensorSubclassLike(candidate);
  at::Tensor sums;
  at::Tensor loss =
      MatchingLoss::apply(candidate, observed, images, Settings{weights, kind, tv_weight, isotropic}, both_ways, &sums);
  return {std::move(loss), std::move(sums)};
}

TORCH_LIBRARY_IMPL(r2f, AutogradCPU, library) { library.impl("matching_loss", &matching_loss); }
TORCH_LIBRARY_IMPL(r2f, AutogradCUDA, library) { library.impl("matching_loss", &matching_loss); }

}  // namespace
}  // namespace r2f
