// torch.ops.r2f.perceptrons and its backward in ATen operators. Schemas and formulas are in r2f_ext/ops.
//
// On CUDA, perceptrons of the same shapes form a group, which takes one batched product per linear layer. Their tensors
// are first copied into stacked ones, because for small layers a kernel launch costs more than the arithmetic. On the
// CPU each perceptron is a group of its own, because copying the weights costs more than it saves.
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <map>
#include <tuple>
#include <vector>

#include "torch/glue.h"

namespace r2f {
namespace {

using Group = std::vector<size_t>;  // the indices of its decoders

// A list that holds `per_decoder` tensors for each decoder, decoder by decoder.
struct PerDecoder {
  at::TensorList tensors;
  size_t per_decoder;

  const at::Tensor& of(size_t decoder, size_t j) const { return tensors[decoder * per_decoder + j]; }

  // Tensor j of a group's decoders: the tensor itself for one decoder, stacked along a new first dimension for several.
  at::Tensor gather(const Group& group, size_t j) const {
    if (group.size() == 1) return of(group[0], j);
    Tensors picked;
    for (const size_t decoder : group) picked.push_back(of(decoder, j));
    return at::stack(picked);
  }
};

// The inverse of `gather`: result is [...] for one decoder, [decoders, ...] for several. Stacked results are copied
// out, in one kernel, because an operator's outputs must not share memory.
void scatter(const at::Tensor& result, const Group& group, size_t per_decoder, size_t j, Tensors& to) {
  Tensors parts{result};
  if (group.size() > 1) {
    const Tensors stacked = result.unbind();
    parts.clear();
    for (const at::Tensor& part : stacked) parts.push_back(at::empty(part.sizes(), part.options()));
    at::_foreach_copy_(parts, stacked);
  }
  for (size_t k = 0; k < group.size(); ++k) to[group[k] * per_decoder + j] = parts[k];
}

size_t depth_of(at::TensorList inputs, at::TensorList weights) {
  TORCH_CHECK(!inputs.empty() && !weights.empty() && weights.size() % inputs.size() == 0,
              "perceptrons: every decoder needs the same number of linear layers, at least 1");
  glue::dtype_of("perceptrons", inputs[0]);  // refuses other dtypes
  return weights.size() / inputs.size();
}

void check_shapes(at::TensorList inputs, at::TensorList weights, at::TensorList biases, size_t depth) {
  TORCH_CHECK(biases.size() == weights.size(), "perceptrons: as many biases as weights are needed");
  for (size_t l = 0; l < inputs.size(); ++l) {
    int64_t width = inputs[l].dim() == 2 ? inputs[l].size(1) : -1;
    for (size_t k = l * depth; k < (l + 1) * depth; ++k) {
      TORCH_CHECK(weights[k].dim() == 2 && weights[k].size(1) == width && biases[k].dim() == 1 &&
                      biases[k].size(0) == weights[k].size(0),
                  "perceptrons: inputs [b, n], weights [out, in] and biases [out] are needed");
      width = weights[k].size(0);
    }
  }
}

std::vector<Group> groups_of(at::TensorList inputs, at::TensorList weights, size_t depth) {
  std::map<std::vector<int64_t>, Group> by_key;
  for (size_t l = 0; l < inputs.size(); ++l) {
    std::vector<int64_t> key = inputs[l].sizes().vec();
    for (size_t j = 0; j < depth; ++j) key.push_back(weights[l * depth + j].size(0));
    if (inputs[0].is_cpu()) key.push_back(static_cast<int64_t>(l));
    by_key[key].push_back(l);
  }
  std::vector<Group> groups;
  for (const auto& [key, group] : by_key) groups.push_back(group);
  return groups;
}

// input W^T + bias; input [b, in] or [decoders, b, in].
// The activation is a call of its own: the library's fused epilogue computes GELU by tanh, this form has erf.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  return input.dim() == 2 ? at::linear(input, weight, bias) : at::baddbmm(bias.unsqueeze(1), input, weight.mT());
}

std::tuple<Tensors, Tensors> perceptrons(at::TensorList inputs, at::TensorList weights, at::TensorList biases,
                                         bool with_saved) {
  const size_t depth = depth_of(inputs, weights), hidden = depth - 1;
  check_shapes(inputs, weights, biases, depth);
  const c10::OptionalDeviceGuard guard(inputs[0].device());
  Tensors outputs(inputs.size()), saved(with_saved ? inputs.size() * hidden : 0);
  for (const Group& group : groups_of(inputs, weights, depth)) {
    at::Tensor values = PerDecoder{inputs, 1}.gather(group, 0);
    for (size_t j = 0; j < depth; ++j) {
      values = linear(values, PerDecoder{weights, depth}.gather(group, j), PerDecoder{biases, depth}.gather(group, j));
      if (j == hidden) break;
      if (with_saved) scatter(values, group, hidden, j, saved);
      values = at::gelu(values);
    }
    scatter(values, group, 1, 0, outputs);
  }
  return {std::move(outputs), std::move(saved)};
}

std::tuple<Tensors, Tensors, Tensors> perceptrons_backward(at::TensorList grads, at::TensorList inputs,
                                                           at::TensorList weights, at::TensorList saved,
                                                           bool needs_inputs) {
  const size_t depth = depth_of(inputs, weights), hidden = depth - 1;
  TORCH_CHECK(grads.size() == inputs.size() && saved.size() == inputs.size() * hidden,
              "perceptrons_backward: one gradient per output and the saved tensors of the forward are needed");
  const c10::OptionalDeviceGuard guard(inputs[0].device());
  Tensors grad_inputs(needs_inputs ? inputs.size() : 0), grad_weights(weights.size()), grad_biases(weights.size());
  for (const Group& group : groups_of(inputs, weights, depth)) {
    at::Tensor grad = PerDecoder{grads, 1}.gather(group, 0);
    for (size_t j = depth; j-- > 0;) {
      const at::Tensor pre_activation = j > 0 ? PerDecoder{saved, hidden}.gather(group, j - 1) : at::Tensor();
      const at::Tensor values = j > 0 ? at::gelu(pre_activation) : PerDecoder{inputs, 1}.gather(group, 0);
      scatter(at::matmul(grad.mT(), values), group, depth, j, grad_weights);
      scatter(at::sum(grad, -2), group, depth, j, grad_biases);
      if (j == 0 && !needs_inputs) break;
      grad = at::matmul(grad, PerDecoder{weights, depth}.gather(group, j));
      if (j > 0) grad = at::gelu_backward(grad, pre_activation);
    }
    if (needs_inputs) scatter(grad, group, 1, 0, grad_inputs);
  }
  return {std::move(grad_inputs), std::move(grad_weights), std::move(grad_biases)};
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("perceptrons", &perceptrons);
  library.impl("perceptrons_backward", &perceptrons_backward);
}

#ifdef R2F_WITH_CUDA
TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("perceptrons", &perceptrons);
  library.impl("perceptrons_backward", &perceptrons_backward);
}
#endif

}  // namespace
}  // namespace r2f
