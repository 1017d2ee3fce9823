// torch.ops.r2f.add_weighted_gradients_ in ATen operators. The schema and the choice between the two forms are
// explained in r2f_ext/ops/add_weighted_gradients.py.
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/glue.h"

namespace r2f {
namespace {

constexpr int64_t kScratch = int64_t{1} << 25;  // maximum elements of a temporary tensor: 128 MiB in float32
constexpr int64_t kTraffic = 64;  // multiply-adds in the time that one element takes to be written to memory and read

struct Layer {
  const at::Tensor &total, &weights, &x, &delta;  // [V, d_out, d_in], [V, P], [P, N, d_in], [P, N, d_out]

  int64_t victims() const { return weights.size(0); }
  int64_t pairs() const { return weights.size(1); }
  int64_t tokens() const { return x.size(1); }
  int64_t d_in() const { return x.size(2); }
  int64_t d_out() const { return delta.size(2); }
};

void check(const Layer& layer) {
  const char* op = "add_weighted_gradients_";
  TORCH_CHECK(layer.weights.dim() == 2 && layer.x.dim() == 3 && layer.delta.dim() == 3 &&
                  layer.x.size(0) == layer.pairs() && layer.delta.size(0) == layer.pairs() &&
                  layer.delta.size(1) == layer.tokens() &&
                  layer.total.sizes() == at::IntArrayRef({layer.victims(), layer.d_out(), layer.d_in()}),
              op, ": totals [V, d_out, d_in], weights [V, P], x [P, N, d_in] and delta [P, N, d_out] are needed");
  TORCH_CHECK(layer.total.is_contiguous(), op, ": totals must be contiguous");
  glue::dtype_of(op, layer.x);  // refuses other dtypes
  const at::ScalarType wide = glue::result_options(layer.x).dtype().toScalarType();
  TORCH_CHECK(layer.delta.scalar_type() == layer.x.scalar_type() && layer.total.scalar_type() == wide &&
                  layer.weights.scalar_type() == wide,
              op, ": x and delta must share a dtype, totals and weights must be float32 (float64 for float64)");
}

// Calls `add(first, count)` for consecutive runs of pairs such that count * elements stays within the scratch memory.
template <typename Add>
void for_chunks(const Layer& layer, int64_t elements, Add add) {
  const int64_t chunk = std::max<int64_t>(1, kScratch / std::max<int64_t>(1, elements));
  for (int64_t first = 0; first < layer.pairs(); first += chunk) add(first, std::min(chunk, layer.pairs() - first));
}

void add_by_weighted_deltas(const Layer& layer) {
  const at::ScalarType dtype = layer.total.scalar_type();
  for_chunks(layer, layer.tokens() * std::max(layer.d_in(), layer.d_out()), [&](int64_t first, int64_t count) {
    const at::Tensor x = layer.x.narrow(0, first, count).to(dtype).reshape({-1, layer.d_in()});
    const at::Tensor delta = layer.delta.narrow(0, first, count), weights = layer.weights.narrow(1, first, count);
    for (int64_t v = 0; v < layer.victims(); ++v) {
      const at::Tensor weighted = at::mul(delta, weights.select(0, v).view({-1, 1, 1})).reshape({-1, layer.d_out()});
      layer.total.select(0, v).addmm_(weighted.t(), x);
    }
  });
}

void add_by_dense_gradients(const Layer& layer) {
  const at::ScalarType dtype = layer.total.scalar_type();
  const at::Tensor total = layer.total.view({layer.victims(), layer.d_out() * layer.d_in()});
  for_chunks(layer, layer.d_out() * layer.d_in(), [&](int64_t first, int64_t count) {
    const at::Tensor gradients =
        at::bmm(layer.delta.narrow(0, first, count).to(dtype).mT(), layer.x.narrow(0, first, count).to(dtype));
    total.addmm_(layer.weights.narrow(1, first, count), gradients.view({count, layer.d_out() * layer.d_in()}));
  });
}

void add_weighted_gradients_(at::TensorList totals, at::TensorList weights, at::TensorList x, at::TensorList delta) {
  TORCH_CHECK(weights.size() == totals.size() && x.size() == totals.size() && delta.size() == totals.size(),
              "add_weighted_gradients_: all lists must have the same length");
  for (size_t l = 0; l < totals.size(); ++l) {
    const Layer layer{totals[l], weights[l], x[l], delta[l]};
    check(layer);
    if (layer.total.numel() == 0 || layer.x.numel() == 0) continue;
    if (layer.victims() * layer.tokens() <= layer.tokens() + layer.victims() + kTraffic)
      add_by_weighted_deltas(layer);
    else
      add_by_dense_gradients(layer);
  }
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) { library.impl("add_weighted_gradients_", &add_weighted_gradients_); }

#ifdef R2F_WITH_CUDA
TORCH_LIBRARY_IMPL(r2f, CUDA, library) { library.impl("add_weighted_gradients_", &add_weighted_gradients_); }
#endif

}  // namespace
}  // namespace r2f
