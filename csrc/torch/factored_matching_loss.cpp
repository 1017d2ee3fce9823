// torch.ops.r2f.factored_matching_loss and its backward on the CPU, with matrix products by the library; on CUDA see
// factored_matching_loss_cuda.cpp. The schemas and their meaning are in r2f_ext/ops.
//
// With G = delta^T x, D = delta delta^T and X = x x^T of a layer and trial, and G* the observed gradient:
//   |G|^2 = sum D o X,     <G, G*> = sum (delta G*) o x
// and for a gradient dL/dG = a G* + b G of the loss
//   dL/dx = a (delta G*) + b D x,      dL/ddelta = a (x G*^T) + b X delta.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "kernels/matching_loss.h"
#include "torch/factored.h"

namespace r2f {
namespace {

using namespace glue;

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // loss, sums, saved
using Backward = std::tuple<Tensors, Tensors, at::Tensor>;       // grad_x, grad_delta, grad_images

// Deltas are loss gradients, tiny in float32. They are multiplied by this power of two (exact), so that squares of
// deltas from 1e-28 to 1e9 neither underflow nor overflow. float64 needs no scaling.
double delta_unit(DType dtype) { return dtype == DType::kFloat64 ? 1.0 : 4294967296.0; }

// The inputs of one layer: contiguous, of the accumulation type, deltas in units.
struct Layer {
  at::Tensor x, delta, observed;         // [T, N, d_in], [T, N, d_out], [T, d_out, d_in] or [1, d_out, d_in]
  at::Tensor delta_gram, x_gram, cross;  // views of the saved tensor: D and X [T, N, N]; delta G* [T, N, d_in]
};

struct Call {
  std::vector<Layer> layers;
  DType dtype;
  MatchingKind kind;
  int64_t count = 0, trials = 0;
  double unit = 1;
  at::TensorOptions result;
  Images images;
};

Call prepare(at::TensorList x, at::TensorList delta, at::TensorList observed, at::ArrayRef<double> weights,
             std::string_view kind, const at::Tensor& images, bool isotropic) {
  check_factored(x, delta, observed, weights);
  const size_t count = x.size();
  Call call;
  call.dtype = dtype_of("factored_matching_loss", x[0]);
  call.kind = matching_kind("factored_matching_loss", kind);
  call.count = static_cast<int64_t>(count), call.trials = x[0].size(0);
  call.unit = delta_unit(call.dtype);
  call.result = result_options(x[0]);
  const at::ScalarType type = call.result.dtype().toScalarType();
  const auto wide = [&](const at::Tensor& t) { return t.to(type).contiguous(); };
  const auto in_units = [&](const at::Tensor& t) { return call.unit == 1 ? wide(t) : wide(t).mul(call.unit); };
  for (size_t l = 0; l < count; ++l) {
    Layer layer;
    layer.x = wide(x[l]), layer.delta = in_units(delta[l]), layer.observed = wide(observed[l]);
    call.layers.push_back(std::move(layer));
  }
  call.images = prepare_images("factored_matching_loss", images, call.trials, x[0].device(), isotropic);
  return call;
}

// Elements of the saved tensor per trial of one layer.
int64_t saved_size(const Layer& layer) {
  const int64_t n = layer.x.size(1);
  return 2 * n * n + n * layer.x.size(2);
}

int64_t saved_size(const Call& call) {
  int64_t size = 0;
  for (const Layer& layer : call.layers) size += call.trials * saved_size(layer);
  return size;
}

// Points the layers' Gram matrices and cross products at parts of `saved`.
void set_views(Call& call, const at::Tensor& saved) {
  int64_t offset = 0;
  const auto next = [&](int64_t rows, int64_t columns) {
    const int64_t size = call.trials * rows * columns;
    offset += size;
    return saved.narrow(0, offset - size, size).view({call.trials, rows, columns});
  };
  for (Layer& layer : call.layers) {
    const int64_t n = layer.x.size(1);
    layer.delta_gram = next(n, n), layer.x_gram = next(n, n), layer.cross = next(n, layer.x.size(2));
  }
}

// out = a b for a [T, N, J], contiguous, and b [T, J, K] or [1, J, K].
void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
  if (b.size(0) == a.size(0)) {
    at::bmm_out(out, a, b);
    return;
  }
  const int64_t rows = a.size(0) * a.size(1);
  at::Tensor flat = out.view({rows, b.size(2)});
  at::mm_out(flat, a.view({rows, a.size(2)}), b.squeeze(0));
}

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  multiply(a, b, out);
  return out;
}

using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;  // contiguous, [T, ...] with one T

// The sum over the elements of a o b for each pair and trial: [pairs, T], float64.
at::Tensor inner_products(const Pairs& pairs) {
  const at::Tensor& first = pairs[0].first;
  const int64_t trials = first.size(0), count = static_cast<int64_t>(pairs.size());
  const DType dtype = dtype_of("factored_matching_loss", first);
  std::vector<MatchingLayer> layers;
  for (const auto& [a, b] : pairs) {
    MatchingLayer layer;
    layer.candidate = a.const_data_ptr(), layer.observed = b.const_data_ptr();
    layer.size = trials == 0 ? 0 : a.numel() / trials;
    layers.push_back(layer);
  }
  MatchingArgs args;
  args.layers = layers.data(), args.count = count, args.trials = trials;
  std::vector<MatchingSums> chunk_sums(static_cast<size_t>(matching_chunks(args) * trials));
  at::parallel_for(0, matching_chunks(args), 1, [&](int64_t begin, int64_t end) {
    matching_chunk_sums_cpu(dtype, args, false, begin, end, chunk_sums.data());
  });
  std::vector<MatchingSums> sums(static_cast<size_t>(count * trials));
  matching_layer_sums_cpu(args, chunk_sums.data(), sums.data());
  const at::Tensor result = at::empty({count, trials}, first.options().dtype(at::kDouble));
  double* data = static_cast<double*>(result.mutable_data_ptr());
  for (size_t i = 0; i < sums.size(); ++i) data[i] = sums[i].inner;
  return result;
}

// |G*|^2 of each layer and trial: [layers, T].
at::Tensor observed_squares(const Call& call) {
  Tensors squares;
  for (const Layer& layer : call.layers) {
    const at::Tensor square = inner_products({{layer.observed, layer.observed}});
    squares.push_back(square.select(0, 0).expand({call.trials}));
  }
  return at::stack(squares);
}

// The sums [layers, T, 4], in the order of MatchingSums. Fills `saved` for the backward.
at::Tensor make_sums(Call& call, const at::Tensor& saved) {
  set_views(call, saved);
  Pairs candidate, inner;
  for (const Layer& layer : call.layers) {
    multiply(layer.delta, layer.delta.mT(), layer.delta_gram);
    multiply(layer.x, layer.x.mT(), layer.x_gram);
    multiply(layer.delta, layer.observed, layer.cross);
    candidate.emplace_back(layer.delta_gram, layer.x_gram);
    inner.emplace_back(layer.cross, layer.x);
  }
  const double one = 1 / call.unit;
  const at::Tensor c = inner_products(candidate).mul(one * one).clamp_min(0);  // NaN stays NaN
  const at::Tensor i = inner_products(inner).mul(one), o = observed_squares(call);
  return at::stack({i, c, o, c.sub(i, 2).add(o).clamp_min(0)}, -1);
}

// Losses [T] from the sums and the images.
at::Tensor losses_of(const Call& call, const at::Tensor& sums, at::ArrayRef<double> weights, double tv_weight) {
  const MatchingSums* data = static_cast<const MatchingSums*>(sums.const_data_ptr());
  Doubles losses(static_cast<size_t>(call.trials)), planes(static_cast<size_t>(call.images.args.planes()));
  matching_losses(call.kind, weights.data(), call.count, call.trials, data, losses.data());
  at::parallel_for(0, call.images.args.planes(), 1, [&](int64_t first, int64_t last) {
    total_variation_cpu(call.images.dtype, call.images.args, first, last, planes.data());
  });
  add_planes(call.images.args, planes, tv_weight, losses.data());
  return from_doubles(losses, call.result);
}

// [layers, T, 2], float64: a and b of dL/dG = a G* + b G.
at::Tensor coefficients_of(const Call& call, const at::Tensor& grad_loss, const at::Tensor& sums,
                           at::ArrayRef<double> weights) {
  const MatchingSums* data =
      checked_sums("factored_matching_loss", sums, grad_loss, call.count, call.trials, call.result.device());
  const at::Tensor result = at::empty({call.count, call.trials, 2}, sums.options());
  MatchingCoefficients* coefficients = static_cast<MatchingCoefficients*>(result.mutable_data_ptr());
  const Doubles grads = to_doubles(grad_loss);
  matching_coefficients(call.kind, weights.data(), call.count, call.trials, data, grads.data(), coefficients);
  return result;
}

at::Tensor image_gradient(const Call& call, const at::Tensor& grad_loss, double tv_weight) {
  const at::Tensor result = empty_gradient(call.images);
  const Doubles grads = to_doubles(grad_loss);
  at::parallel_for(0, call.images.args.planes(), 1, [&](int64_t first, int64_t last) {
    total_variation_backward_cpu(call.images.dtype, call.images.args, grads.data(), tv_weight,
                                 result.mutable_data_ptr(), first, last);
  });
  return result;
}

Forward forward(at::TensorList x, at::TensorList delta, at::TensorList observed, at::ArrayRef<double> weights,
                std::string_view kind, const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  Call call = prepare(x, delta, observed, weights, kind, images, isotropic);
  at::Tensor saved = at::empty({saved_size(call)}, call.result);
  at::Tensor sums = make_sums(call, saved);
  return {losses_of(call, sums, weights, tv_weight), std::move(sums), std::move(saved)};
}

Backward backward(const at::Tensor& grad_loss, at::TensorList x, at::TensorList delta, at::TensorList observed,
                  const at::Tensor& sums, const at::Tensor& saved, at::ArrayRef<double> weights, std::string_view kind,
                  const at::Tensor& images, double tv_weight, bool isotropic) {
  TORCH_CHECK(!x.empty(), "factored_matching_loss: at least one x");
  Call call = prepare(x, delta, observed, weights, kind, images, isotropic);
  TORCH_CHECK(saved.is_contiguous() && saved.sizes() == at::IntArrayRef({saved_size(call)}) &&
                  saved.dtype() == call.result.dtype() && saved.device() == call.result.device(),
              "factored_matching_loss: saved must be what the forward returned");
  set_views(call, saved);
  const at::Tensor coefficients = coefficients_of(call, grad_loss, sums, weights);
  const at::Tensor a = coefficients.select(-1, 0), b = coefficients.select(-1, 1);
  const double one = 1 / call.unit;
  const at::Tensor factors =  // [4, layers, T, 1, 1]
      at::stack({a.mul(one), b.mul(one * one), a, b.mul(one)})
          .to(call.result.dtype().toScalarType())
          .view({4, call.count, call.trials, 1, 1});
  Tensors grad_x, grad_delta;
  for (size_t l = 0; l < call.layers.size(); ++l) {
    const Layer& layer = call.layers[l];
    const Tensors f = factors.select(1, static_cast<int64_t>(l)).unbind(0);
    grad_x.push_back(layer.cross.mul(f[0]));
    grad_delta.push_back(multiply(layer.x, layer.observed.mT()).mul_(f[2]));
    grad_x[l].baddbmm_(layer.delta_gram.mul(f[1]), layer.x);
    grad_delta[l].baddbmm_(layer.x_gram.mul(f[3]), layer.delta);
  }
  return {std::move(grad_x), std::move(grad_delta), image_gradient(call, grad_loss, tv_weight)};
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("factored_matching_loss", &forward);
  library.impl("factored_matching_loss_backward", &backward);
}

}  // namespace
}  // namespace r2f
