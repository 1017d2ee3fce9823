// How autograd goes through torch.ops.r2f.matching_loss where the kernels are compiled; elsewhere ops/matching_loss.py
// says it. In C++, since for lists of tensors a Python Function costs as much as the kernels.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
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
  std::vector<double> weights;
  std::string kind;
  double tv_weight;
  bool isotropic;
};

// Whether the data may be read past the dispatcher: no subclass, no mode, no lazy sign or zero.
bool is_plain(const at::Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && !t.is_neg() && !t._is_zerotensor() && !at::isTensorSubclassLike(t);
}

bool all_plain(at::TensorList tensors) { return std::all_of(tensors.begin(), tensors.end(), is_plain); }

std::optional<at::Tensor> if_defined(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

// What is saved: the inputs, the sums, and the gradients that the forward made, if it did.
struct Saved {
  Tensors all;
  size_t count;  // of layers

  Saved(Tensors saved, int64_t layers) : all(std::move(saved)), count(static_cast<size_t>(layers)) {}
  at::TensorList inputs() const { return at::TensorList(all).slice(0, 2 * count); }
  at::TensorList candidate() const { return inputs().slice(0, count); }
  at::TensorList observed() const { return inputs().slice(count); }
  const at::Tensor& images() const { return all[2 * count]; }
  const at::Tensor& sums() const { return all[2 * count + 1]; }
  bool has_gradients() const { return all.size() > 2 * count + 2; }
  MatchingBothWays gradients() const {
    const auto first = all.begin() + static_cast<std::ptrdiff_t>(2 * count + 2);
    return {at::Tensor(), sums(), Tensors(first, first + static_cast<std::ptrdiff_t>(count)), all.back()};
  }
};

struct MatchingLoss : torch::autograd::Function<MatchingLoss> {
  // Neighbours in the list of inputs: candidate, observed, images; what follows them are no tensors.
  static constexpr size_t kNoTensors = 3;

  static at::Tensor forward(AutogradContext* ctx, at::TensorList candidate, at::TensorList observed,
                            const std::optional<at::Tensor>& images, const Settings& settings, bool both_ways,
                            at::Tensor* sums) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    MatchingBothWays results;
    if (both_ways) {
      results = matching_loss_both_ways_on_cpu(candidate, observed, settings.weights, settings.kind, images,
                                               settings.tv_weight, settings.isotropic);
    } else {
      static const auto forward = find<Forward>("r2f::matching_loss");
      std::tie(results.loss, results.sums) = forward.call(candidate, observed, settings.weights, settings.kind, images,
                                                          settings.tv_weight, settings.isotropic);
    }
    *sums = results.sums;
    Tensors saved;
    saved.reserve(3 * candidate.size() + 3);
    saved.insert(saved.end(), candidate.begin(), candidate.end());
    saved.insert(saved.end(), observed.begin(), observed.end());
    saved.push_back(images.value_or(at::Tensor())), saved.push_back(results.sums);
    if (both_ways) {
      saved.insert(saved.end(), results.grad_candidate.begin(), results.grad_candidate.end());
      saved.push_back(results.grad_images);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["layers"] = static_cast<int64_t>(candidate.size());
    ctx->saved_data["weights"] = settings.weights;
    ctx->saved_data["kind"] = settings.kind;
    ctx->saved_data["tv_weight"] = settings.tv_weight;
    ctx->saved_data["isotropic"] = settings.isotropic;
    return results.loss;
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    const Saved saved(ctx->get_saved_variables(), ctx->saved_data["layers"].toInt());
    const Settings settings{ctx->saved_data["weights"].toDoubleVector(), ctx->saved_data["kind"].toStringRef(),
                            ctx->saved_data["tv_weight"].toDouble(), ctx->saved_data["isotropic"].toBool()};
    // A graph that is kept keeps its tensors as well: no one else may have them.
    const bool by_forward = saved.has_gradients() && !at::GradMode::is_enabled() && is_plain(grads[0]) &&
                            !torch::autograd::get_current_graph_task_keep_graph();
    auto [result, grad_images] =
        by_forward ? gradients_of_forward(saved, grads[0])
                   : gradients(saved, settings, grads[0],
                               ctx->needs_input_grad({torch::autograd::IndexRange{saved.count, 2 * saved.count}}));
    for (size_t l = 0; l < result.size(); ++l) result[l] = result[l].to(saved.inputs()[l].scalar_type());
    result.resize(2 * saved.count);
    result.push_back(saved.images().defined() ? grad_images.to(saved.images().scalar_type()) : at::Tensor());
    result.resize(result.size() + kNoTensors);
    return result;
  }

 private:
  using Gradients = std::pair<Tensors, at::Tensor>;  // of candidate and perhaps observed; of the images

  // The forward's are for losses' gradients of 1.
  static Gradients gradients_of_forward(const Saved& saved, const at::Tensor& grad_loss) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    MatchingBothWays results = saved.gradients();
    const at::Tensor grads = grad_loss.to(at::kDouble).contiguous();
    const double* first = grads.const_data_ptr<double>();
    if (!std::all_of(first, first + grads.numel(), [](double grad) { return grad == 1; })) {
      for (const at::Tensor& gradient : results.grad_candidate) multiply_trials(gradient, grads);
      if (saved.images().defined()) multiply_trials(results.grad_images, grads);
    }
    return {std::move(results.grad_candidate), results.grad_images};
  }

  static void multiply_trials(at::Tensor tensor, const at::Tensor& factors) {
    std::vector<int64_t> shape(static_cast<size_t>(tensor.dim()), 1);
    shape[0] = factors.size(0);
    at::mul_out(tensor, tensor, factors.to(tensor.scalar_type()).view(shape));
  }

  static Gradients gradients(const Saved& saved, const Settings& settings, const at::Tensor& grad_loss,
                             bool to_observed) {
    static const auto backward = find<Backward>("r2f::matching_loss_backward");
    // Where a graph of the gradient is wanted, autograd has another way (ops/matching_loss.py).
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    auto [result, grad_observed, grad_images] =
        backward.call(grad_loss, saved.candidate(), saved.observed(), saved.sums(), settings.weights, settings.kind,
                      if_defined(saved.images()), settings.tv_weight, settings.isotropic, to_observed);
    result.insert(result.end(), grad_observed.begin(), grad_observed.end());
    return {std::move(result), grad_images};
  }
};

std::tuple<at::Tensor, at::Tensor> matching_loss(at::TensorList candidate, at::TensorList observed,
                                                 at::ArrayRef<double> weights, std::string_view kind,
                                                 const std::optional<at::Tensor>& images, double tv_weight,
                                                 bool isotropic) {
  const auto requires_grad = [](const at::Tensor& t) { return t.requires_grad(); };
  const bool both_ways = at::GradMode::is_enabled() && std::all_of(candidate.begin(), candidate.end(), requires_grad) &&
                         std::none_of(observed.begin(), observed.end(), requires_grad) && all_plain(candidate) &&
                         all_plain(observed) && (!images.has_value() || is_plain(*images));
  at::Tensor sums;
  at::Tensor loss = MatchingLoss::apply(
      candidate, observed, images, Settings{weights.vec(), std::string(kind), tv_weight, isotropic}, both_ways, &sums);
  return {std::move(loss), std::move(sums)};
}

TORCH_LIBRARY_IMPL(r2f, AutogradCPU, library) { library.impl("matching_loss", &matching_loss); }
TORCH_LIBRARY_IMPL(r2f, AutogradCUDA, library) { library.impl("matching_loss", &matching_loss); }

}  // namespace
}  // namespace r2f
