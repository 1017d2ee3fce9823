// torch.ops.r2f.factored_matching_loss and its backward on compiled kernels. The schemas and the meaning are in
// r2f_ext/ops. Products with a dense observed gradient are the library's.
#include "kernels/factored_matching_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels/matching_loss.h"
#include "torch/glue.h"
#include "torch/matching_kind.h"

namespace r2f {
namespace {

using Tensors = std::vector<at::Tensor>;

// One layer's inputs as the kernels take them: contiguous, of the accumulation type, deltas in units.
struct Factors {
  at::Tensor x, delta, observed, observed_x, observed_delta;
};

struct Call {
  std::vector<Factors> factors;
  std::vector<FactoredLayer> layers;
  DType dtype;
  MatchingKind kind;
  int64_t count = 0, trials = 0;
  at::TensorOptions result;

  // a b [T, N, .] for a [T, N, .] and b [T, ., .] or [1, ., .]
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
    if (b.size(0) == a.size(0)) return at::bmm(a, b);
    const int64_t trials = a.size(0), tokens = a.size(1);
    return at::mm(a.view({trials * tokens, a.size(2)}), b.squeeze(0)).view({trials, tokens, b.size(2)});
  }
  bool dense() const { return factors[0].observed.defined(); }
};

void check_layer(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& observed, const at::Tensor& first) {
  TORCH_CHECK(x.dim() == 3 && delta.dim() == 3 && x.size(0) == first.size(0) && x.size(0) == delta.size(0) &&
                  x.size(1) == delta.size(1),
              "factored_matching_loss: x must be tensors [T, N, d_in] and delta [T, N, d_out]");
  TORCH_CHECK(observed.dim() == 3 && (observed.size(0) == x.size(0) || observed.size(0) == 1),
              "factored_matching_loss: observed must be tensors [T, ., .] or [1, ., .]");
  for (const at::Tensor& t : {x, delta, observed})
    TORCH_CHECK(t.scalar_type() == first.scalar_type() && t.device() == first.device(),
                "factored_matching_loss: one dtype and one device");
}

Call prepare(at::TensorList x, at::TensorList delta, at::TensorList observed, at::TensorList observed_delta,
             at::ArrayRef<double> weights, std::string_view kind) {
  const size_t count = x.size();
  TORCH_CHECK(count > 0 && delta.size() == count && observed.size() == count && weights.size() == count &&
                  (observed_delta.empty() || observed_delta.size() == count),
              "factored_matching_loss: as many x as delta, observed and weights, and at least one");
  Call call;
  call.dtype = glue::dtype_of("factored_matching_loss", x[0]);
  call.kind = glue::matching_kind("factored_matching_loss", kind);
  call.count = static_cast<int64_t>(count), call.trials = x[0].size(0);
  call.result = glue::result_options(x[0]);
  const at::ScalarType type = call.result.dtype().toScalarType();
  const auto wide = [&](const at::Tensor& t) { return t.to(type).contiguous(); };
  const auto in_units = [&](const at::Tensor& t) {
    return call.dtype == DType::kFloat64 ? wide(t) : at::mul(wide(t), delta_unit(call.dtype));
  };
  for (size_t l = 0; l < count; ++l) {
    check_layer(x[l], delta[l], observed[l], x[0]);
    FactoredLayer layer;
    layer.tokens = x[l].size(1), layer.d_in = x[l].size(2), layer.d_out = delta[l].size(2);
    layer.observed_is_shared = observed[l].size(0) == 1;
    Factors f{wide(x[l]), in_units(delta[l]), {}, {}, {}};
    if (observed_delta.empty()) {
      TORCH_CHECK(observed[l].size(1) == layer.d_out && observed[l].size(2) == layer.d_in,
                  "factored_matching_loss: observed must be tensors [T, d_out, d_in] or [1, d_out, d_in]");
      f.observed = wide(observed[l]);
    } else {
      const at::Tensor &o = observed[l], &d = observed_delta[l];
      TORCH_CHECK(d.dim() == 3 && d.size(0) == o.size(0) && d.size(1) == o.size(1) && d.size(2) == layer.d_out &&
                      o.size(2) == layer.d_in,
                  "factored_matching_loss: observed must be [T, M, d_in] and observed_delta [T, M, d_out], T or 1");
      layer.observed_tokens = o.size(1);
      f.observed_x = wide(o), f.observed_delta = in_units(d);
      layer.observed_x = f.observed_x.const_data_ptr(), layer.observed_delta = f.observed_delta.const_data_ptr();
    }
    layer.x = f.x.const_data_ptr(), layer.delta = f.delta.const_data_ptr();
    call.factors.push_back(std::move(f)), call.layers.push_back(layer);
  }
  return call;
}

// A dense gradient without elements has a null address, which would mean "factored".
const void* observed_data(const at::Tensor& observed) {
  static constexpr double kNothing = 0;
  return observed.numel() == 0 ? &kNothing : observed.const_data_ptr();
}

// The products with dense observed gradients, made, or taken from the forward.
void set_products(Call& call, const Tensors& products) {
  for (size_t l = 0; l < products.size(); ++l) {
    TORCH_CHECK(products[l].is_contiguous() && products[l].sizes() == call.factors[l].x.sizes() &&
                    products[l].scalar_type() == call.factors[l].x.scalar_type(),
                "factored_matching_loss: products must be what the forward returned");
    call.layers[l].observed = observed_data(call.factors[l].observed);
    call.layers[l].product = products[l].const_data_ptr();
  }
}

Tensors make_products(const Call& call) {
  Tensors products;
  if (!call.dense()) return products;
  for (const Factors& f : call.factors) products.push_back(Call::product(f.delta, f.observed));
  return products;
}

const MatchingSums* checked_sums(const Call& call, const at::Tensor& sums, const at::Tensor& grad_loss) {
  TORCH_CHECK(sums.is_contiguous() && sums.scalar_type() == at::kDouble && sums.device() == call.result.device() &&
                  sums.sizes() == at::IntArrayRef({call.count, call.trials, 4}),
              "factored_matching_loss: sums must be what the forward returned");
  TORCH_CHECK(grad_loss.sizes() == at::IntArrayRef({call.trials}) && grad_loss.device() == sums.device(),
              "factored_matching_loss: grad_loss must be [T]");
  return static_cast<const MatchingSums*>(sums.const_data_ptr());
}

at::Tensor losses_tensor(const Call& call, const std::vector<double>& losses) {
  const at::Tensor loss = at::empty({call.trials}, call.result);
  if (call.dtype == DType::kFloat64)
    std::copy(losses.begin(), losses.end(), static_cast<double*>(loss.mutable_data_ptr()));
  else
    std::copy(losses.begin(), losses.end(), static_cast<float*>(loss.mutable_data_ptr()));
  return loss;
}

std::tuple<at::Tensor, at::Tensor, Tensors> forward_on_cpu(at::TensorList x, at::TensorList delta,
                                                           at::TensorList observed, at::TensorList observed_delta,
                                                           at::ArrayRef<double> weights, std::string_view kind) {
  Call call = prepare(x, delta, observed, observed_delta, weights, kind);
  Tensors products = make_products(call);
  set_products(call, products);
  const at::Tensor sums = at::empty({call.count, call.trials, 4}, call.result.dtype(at::kDouble));
  MatchingSums* of = static_cast<MatchingSums*>(sums.mutable_data_ptr());
  at::parallel_for(0, call.count * call.trials, 1, [&](int64_t first, int64_t last) {
    factored_sums_cpu(call.dtype, call.layers.data(), call.trials, first, last, of);
  });
  std::vector<double> losses(static_cast<size_t>(call.trials));
  matching_losses(call.kind, weights.data(), call.count, call.trials, of, losses.data());
  return {losses_tensor(call, losses), sums, std::move(products)};
}

std::tuple<Tensors, Tensors> backward_on_cpu(const at::Tensor& grad_loss, at::TensorList x, at::TensorList delta,
                                             at::TensorList observed, at::TensorList observed_delta,
                                             const at::Tensor& sums, at::TensorList products,
                                             at::ArrayRef<double> weights, std::string_view kind) {
  Call call = prepare(x, delta, observed, observed_delta, weights, kind);
  set_products(call, products.vec());
  const MatchingSums* given = checked_sums(call, sums, grad_loss);
  const at::Tensor grads = grad_loss.to(at::kDouble).contiguous();
  std::vector<MatchingCoefficients> coefficients(static_cast<size_t>(call.count * call.trials));
  matching_coefficients(call.kind, weights.data(), call.count, call.trials, given,
                        static_cast<const double*>(grads.const_data_ptr()), coefficients.data());
  Tensors grad_x, grad_delta;
  for (size_t l = 0; l < call.factors.size(); ++l) {
    const Factors& f = call.factors[l];
    grad_x.push_back(at::empty(f.x.sizes(), call.result));
    grad_delta.push_back(call.dense() ? Call::product(f.x, f.observed.mT()) : at::empty(f.delta.sizes(), call.result));
    call.layers[l].grad_x = grad_x[l].mutable_data_ptr(), call.layers[l].grad_delta = grad_delta[l].mutable_data_ptr();
  }
  at::parallel_for(0, call.count * call.trials, 1, [&](int64_t first, int64_t last) {
    factored_backward_cpu(call.dtype, call.layers.data(), call.trials, coefficients.data(), first, last);
  });
  return {std::move(grad_x), std::move(grad_delta)};
}

#ifdef R2F_WITH_CUDA
at::Tensor gram(const at::Tensor& a, const at::Tensor& b) { return Call::product(a, b.mT()); }

// Device memory for the weights and what the kernels of one layer or of all need, in float64.
at::Tensor workspace_of(const Call& call, int64_t doubles) {
  return at::empty({doubles}, call.result.dtype(at::kDouble));
}

double* doubles(const at::Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

// What the three sums of a layer are made of, and the tensors that hold it.
struct LayerPairs {
  Tensors kept;
  FactoredPair pairs[3];

  void set(int which, const at::Tensor& a, const at::Tensor& b, int64_t trials, double factor) {
    kept.push_back(a), kept.push_back(b);
    const int64_t size = a.size(0) == 0 ? 0 : a.numel() / a.size(0);
    pairs[which] = {a.const_data_ptr(), b.const_data_ptr(), size, a.size(0) == 1 && trials > 1, factor};
  }
};

LayerPairs pairs_of(const Call& call, const Factors& f, const at::Tensor* product) {
  LayerPairs result;
  const double one = 1 / delta_unit(call.dtype);
  result.set(0, gram(f.delta, f.delta), gram(f.x, f.x), call.trials, one * one);
  if (product != nullptr) {
    result.set(1, *product, f.x, call.trials, one);
    result.set(2, f.observed, f.observed, call.trials, 1);
  } else {
    result.set(1, gram(f.delta, f.observed_delta), gram(f.x, f.observed_x), call.trials, one * one);
    result.set(2, gram(f.observed_delta, f.observed_delta), gram(f.observed_x, f.observed_x), call.trials, one * one);
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, Tensors> forward_on_cuda(at::TensorList x, at::TensorList delta,
                                                            at::TensorList observed, at::TensorList observed_delta,
                                                            at::ArrayRef<double> weights, std::string_view kind) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  const c10::DeviceGuard guard(x[0].device());
  void* stream = glue::current_stream(x[0].device());
  const Call call = prepare(x, delta, observed, observed_delta, weights, kind);
  Tensors products = make_products(call);
  const at::Tensor sums = at::empty({call.count, call.trials, 4}, call.result.dtype(at::kDouble));
  MatchingSums* of = static_cast<MatchingSums*>(sums.mutable_data_ptr());
  for (size_t l = 0; l < call.factors.size(); ++l) {
    const LayerPairs pairs = pairs_of(call, call.factors[l], call.dense() ? &products[l] : nullptr);
    const at::Tensor workspace = workspace_of(call, factored_sums_cuda_workspace(pairs.pairs, call.trials));
    glue::check_launch("factored_matching_loss",
                       factored_sums_cuda(call.dtype, pairs.pairs, call.trials,
                                          of + static_cast<int64_t>(l) * call.trials, doubles(workspace), stream));
  }
  const at::Tensor loss = at::empty({call.trials}, call.result), workspace = workspace_of(call, call.count);
  const char* error = matching_losses_cuda(call.dtype, call.kind, weights.data(), call.count, call.trials, of, nullptr,
                                           0, loss.mutable_data_ptr(), doubles(workspace), stream);
  glue::check_launch("factored_matching_loss", error);
  return {loss, sums, std::move(products)};
}

// Per trial: a tensor times a coefficient.
struct Scale {
  const Call& call;
  const MatchingCoefficients* coefficients;  // of one layer
  void* stream;

  at::Tensor operator()(const at::Tensor& in, bool observed, double factor) const {
    const at::Tensor out = at::empty(in.sizes(), in.options());
    const int64_t size = call.trials == 0 ? 0 : in.numel() / call.trials;
    glue::check_launch("factored_matching_loss",
                       factored_scale_cuda(call.dtype, in.const_data_ptr(), out.mutable_data_ptr(), size, call.trials,
                                           coefficients, observed, factor, stream));
    return out;
  }
};

std::tuple<Tensors, Tensors> backward_on_cuda(const at::Tensor& grad_loss, at::TensorList x, at::TensorList delta,
                                              at::TensorList observed, at::TensorList observed_delta,
                                              const at::Tensor& sums, at::TensorList products,
                                              at::ArrayRef<double> weights, std::string_view kind) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  const c10::DeviceGuard guard(x[0].device());
  void* stream = glue::current_stream(x[0].device());
  Call call = prepare(x, delta, observed, observed_delta, weights, kind);
  set_products(call, products.vec());
  const MatchingSums* given = checked_sums(call, sums, grad_loss);
  const at::Tensor grads = grad_loss.to(call.result).contiguous();
  const at::Tensor workspace = workspace_of(call, call.count), all = workspace_of(call, call.count * call.trials * 3);
  MatchingCoefficients* coefficients = reinterpret_cast<MatchingCoefficients*>(doubles(all));
  const char* error = matching_coefficients_cuda(call.dtype, call.kind, weights.data(), call.count, call.trials, given,
                                                 grads.const_data_ptr(), coefficients, doubles(workspace), stream);
  glue::check_launch("factored_matching_loss", error);
  Tensors grad_x, grad_delta;
  const double one = 1 / delta_unit(call.dtype);
  for (size_t l = 0; l < call.factors.size(); ++l) {
    const Factors& f = call.factors[l];
    const Scale scale{call, coefficients + static_cast<int64_t>(l) * call.trials, stream};
    if (call.dense()) {
      grad_x.push_back(scale(products[l], true, one));
      grad_delta.push_back(scale(Call::product(f.x, f.observed.mT()), true, 1));
    } else {
      grad_x.push_back(Call::product(scale(gram(f.delta, f.observed_delta), true, one * one), f.observed_x));
      grad_delta.push_back(Call::product(scale(gram(f.x, f.observed_x), true, one), f.observed_delta));
    }
    grad_x[l].baddbmm_(scale(gram(f.delta, f.delta), false, one * one), f.x);
    grad_delta[l].baddbmm_(scale(gram(f.x, f.x), false, one), f.delta);
  }
  return {std::move(grad_x), std::move(grad_delta)};
}

TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("factored_matching_loss", &forward_on_cuda);
  library.impl("factored_matching_loss_backward", &backward_on_cuda);
}
#endif

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("factored_matching_loss", &forward_on_cpu);
  library.impl("factored_matching_loss_backward", &backward_on_cpu);
}

}  // namespace
}  // namespace r2f
