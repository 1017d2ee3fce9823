// torch.ops.r2f.decode and its backward on compiled kernels. The schemas and the meaning are in r2f_ext/ops. A small
// batch is bound by the weights read: own kernels read each once, for all layers in a few rounds. A large one is bound
// by arithmetic, as is the backward's: matrix products of the library.
#include "kernels/decode.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "torch/glue.h"

namespace r2f {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr int64_t kSmallBatch = 8;  // up to which own kernels are the faster ones

Activation activation_of(std::string_view name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK(name == "identity", "decode: activation must be gelu, relu or identity");
  return Activation::kIdentity;
}

struct Call {
  at::TensorList weights, biases, bases;
  Tensors inputs;  // contiguous, of the accumulation type
  DType dtype;
  Activation activation;
  bool normalize;
  int64_t batch;
  size_t maps;  // of each layer
  at::TensorOptions result;

  size_t layers() const { return inputs.size(); }
  const at::Tensor& weight(size_t layer, size_t map) const { return weights[layer * maps + map]; }
  const at::Tensor* bias(size_t layer, size_t map) const {
    return biases.empty() ? nullptr : &biases[layer * maps + map];
  }
  bool keeps(size_t map) const { return map + 1 < maps || !bases.empty(); }
  at::Tensor wide(const at::Tensor& tensor) const { return tensor.to(result.dtype().toScalarType()); }
  int64_t size(size_t layer) const { return bases.empty() ? weight(layer, maps - 1).size(0) : bases[layer].size(1); }

  // Elements of `kept`: of each layer the norms, what each hidden map's activation is given, the coefficients.
  int64_t kept_size() const {
    int64_t size = normalize ? batch * static_cast<int64_t>(layers()) : 0;
    for (size_t l = 0; l < layers(); ++l)
      for (size_t j = 0; j < maps; ++j) size += keeps(j) ? batch * weight(l, j).size(0) : 0;
    return size;
  }
};

void check_layer(const Call& call, size_t l, const at::Tensor& first) {
  const at::Tensor& input = call.inputs[l];
  TORCH_CHECK(input.dim() == 2 && input.size(0) == call.batch, "decode: inputs must be [b, n]");
  const auto check = [&](const at::Tensor& t) {
    TORCH_CHECK(t.scalar_type() == first.scalar_type() && t.device() == first.device(),
                "decode: one dtype and one device");
  };
  int64_t width = input.size(1);
  for (size_t j = 0; j < call.maps; ++j) {
    const at::Tensor& weight = call.weight(l, j);
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == width, "decode: weights must be [out, in]");
    width = weight.size(0);
    check(weight);
    if (const at::Tensor* bias = call.bias(l, j)) {
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == width, "decode: biases must be [out]");
      check(*bias);
    }
  }
  if (call.bases.empty()) return;
  TORCH_CHECK(call.bases[l].dim() == 2 && call.bases[l].size(0) == width, "decode: bases must be [k, m]");
  check(call.bases[l]);
}

Call prepare(at::TensorList inputs, at::TensorList weights, at::TensorList biases, at::TensorList bases,
             std::string_view activation, bool normalize) {
  const size_t count = inputs.size();
  TORCH_CHECK(count > 0 && !weights.empty() && weights.size() % count == 0 &&
                  (biases.empty() || biases.size() == weights.size()) && (bases.empty() || bases.size() == count),
              "decode: as many maps for each layer, and at least one");
  Call call{weights,
            biases,
            bases,
            {},
            glue::dtype_of("decode", inputs[0]),
            activation_of(activation),
            normalize,
            inputs[0].dim() == 2 ? inputs[0].size(0) : 0,
            weights.size() / count,
            glue::result_options(inputs[0])};
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK(input.scalar_type() == inputs[0].scalar_type() && input.device() == inputs[0].device(),
                "decode: one dtype and one device");
    call.inputs.push_back(call.wide(input).contiguous());
  }
  for (size_t l = 0; l < count; ++l) check_layer(call, l, inputs[0]);
  return call;
}

// The rounds of kernels, on one device or the other. `dtype` is that of the weights.
struct OnCpu {
  static constexpr int64_t kHeadBatch = kDecodeHeadBatchCpu;
  static void norms(const Call& call, const DecodeStage<DecodeNorm>& stage) {
    at::parallel_for(0, stage.count, 1,
                     [&](int64_t first, int64_t last) { decode_norms_cpu(call.dtype, stage, first, last); });
  }
  // `hidden`: all that the stage's maps write, if they are hidden ones.
  static void maps(const Call& call, const DecodeStage<DecodeMap>& stage, Activation activation, at::Tensor hidden) {
    at::parallel_for(0, decode_items(stage), 1,
                     [&](int64_t first, int64_t last) { decode_maps_cpu(call.dtype, stage, first, last); });
    if (activation == Activation::kGelu) at::gelu_(hidden);  // by vectors; erf one by one takes as long as the maps
    if (activation == Activation::kRelu) at::relu_(hidden);
  }
  static void heads(const Call& call, const DecodeStage<DecodeHead>& stage) {
    at::parallel_for(0, decode_items(call.dtype, stage), 1,
                     [&](int64_t first, int64_t last) { decode_heads_cpu(call.dtype, stage, first, last); });
  }
};

#ifdef R2F_WITH_CUDA
struct OnCuda {
  static constexpr int64_t kHeadBatch = kSmallBatch;
  static void* stream(const Call& call) { return glue::current_stream(call.inputs[0].device()); }
  static void norms(const Call& call, const DecodeStage<DecodeNorm>& stage) {
    glue::check_launch("decode", decode_norms_cuda(call.dtype, stage, stream(call)));
  }
  static void maps(const Call& call, const DecodeStage<DecodeMap>& stage, Activation activation, const at::Tensor&) {
    glue::check_launch("decode", decode_maps_cuda(call.dtype, stage, activation, stream(call)));
  }
  static void heads(const Call& call, const DecodeStage<DecodeHead>& stage) {
    glue::check_launch("decode", decode_heads_cuda(call.dtype, stage, stream(call)));
  }
};
#endif

// What is kept of one layer: views of the one array.
struct Kept {
  at::Tensor norm;  // [b, 1]
  Tensors before;   // [b, width]
  at::Tensor coefficients;
};

std::vector<Kept> take_apart(const Call& call, const at::Tensor& kept) {
  TORCH_CHECK(kept.is_contiguous() && kept.dim() == 1 && kept.size(0) == call.kept_size() &&
                  kept.scalar_type() == call.inputs[0].scalar_type() && kept.device() == call.inputs[0].device(),
              "decode: kept must be what the forward returned");
  int64_t at = 0;
  const auto next = [&](int64_t width) {
    const at::Tensor part = kept.narrow(0, at, call.batch * width).view({call.batch, width});
    at += call.batch * width;
    return part;
  };
  std::vector<Kept> layers(call.layers());
  for (size_t l = 0; l < call.layers(); ++l) {
    if (call.normalize) layers[l].norm = next(1);
    for (size_t j = 0; j + 1 < call.maps; ++j) layers[l].before.push_back(next(call.weight(l, j).size(0)));
    if (!call.bases.empty()) layers[l].coefficients = next(call.weight(l, call.maps - 1).size(0));
  }
  return layers;
}

template <typename Device>
void make_norms(const Call& call, const std::vector<Kept>& kept) {
  std::vector<DecodeNorm> norms;
  for (size_t l = 0; l < call.layers(); ++l)
    norms.push_back({call.inputs[l].size(1), call.inputs[l].const_data_ptr(), kept[l].norm.mutable_data_ptr()});
  Device::norms(call, {norms.data(), static_cast<int64_t>(norms.size()), call.batch});
}

// ---- Small batches: one round of kernels for the norms, for each map, and for the heads ----

template <typename Device>
void run_small(const Call& call, const at::Tensor& kept, const Tensors& outputs) {
  if (call.normalize) make_norms<Device>(call, take_apart(call, kept));
  Tensors weights;  // contiguous
  const auto data = [&](const at::Tensor& tensor) {
    weights.push_back(tensor.contiguous());
    return weights.back().const_data_ptr();
  };
  // What the next maps are given, stage by stage; each layer's part starts where wide loads may.
  constexpr int64_t kStart = 8;
  const auto room = [&](int64_t width) { return (call.batch * width + kStart - 1) / kStart * kStart; };
  std::vector<int64_t> starts(call.maps + 1);
  for (size_t j = 0; j < call.maps; ++j) {
    starts[j + 1] = starts[j];
    for (size_t l = 0; call.keeps(j) && l < call.layers(); ++l) starts[j + 1] += room(call.weight(l, j).size(0));
  }
  const at::Tensor values = at::empty({starts.back()}, call.result);
  std::vector<int64_t> next(starts);
  const int64_t bytes = static_cast<int64_t>(kept.element_size());
  char *before = static_cast<char*>(kept.mutable_data_ptr()), *after = static_cast<char*>(values.mutable_data_ptr());
  std::vector<std::vector<DecodeMap>> maps(call.maps, std::vector<DecodeMap>(call.layers()));
  std::vector<DecodeHead> heads;
  int64_t at = 0;
  for (size_t l = 0; l < call.layers(); ++l) {
    const void *in = call.inputs[l].const_data_ptr(), *norm = call.normalize ? before + at * bytes : nullptr;
    if (call.normalize) at += call.batch;
    for (size_t j = 0; j < call.maps; ++j) {
      DecodeMap& map = maps[j][l];
      map.rows = call.weight(l, j).size(0), map.columns = call.weight(l, j).size(1);
      map.weight = data(call.weight(l, j)), map.in = in;
      if (const at::Tensor* bias = call.bias(l, j)) map.bias = data(*bias);
      if (j == 0) map.divisor = norm;
      if (j + 1 == call.maps) map.factor = norm;
      map.out = outputs[l].mutable_data_ptr();
      if (!call.keeps(j)) continue;
      map.before = before + at * bytes, map.out = after + next[j] * bytes, in = map.out;
      at += call.batch * map.rows, next[j] += room(map.rows);
    }
    if (!call.bases.empty())
      heads.push_back({call.bases[l].size(0), call.bases[l].size(1), call.bases[l].size(1), data(call.bases[l]), in,
                       outputs[l].mutable_data_ptr()});
  }
  const int64_t count = static_cast<int64_t>(call.layers());
  for (size_t j = 0; j < call.maps; ++j)
    Device::maps(call, {maps[j].data(), count, call.batch}, j + 1 < call.maps ? call.activation : Activation::kIdentity,
                 values.narrow(0, starts[j], starts[j + 1] - starts[j]));
  if (!call.bases.empty()) Device::heads(call, {heads.data(), count, call.batch});
}

// ---- Large batches and the backward: products of the library ----

at::Tensor activated(Activation activation, const at::Tensor& before) {
  if (activation == Activation::kGelu) return at::gelu(before);
  return activation == Activation::kRelu ? at::relu(before) : before;
}

at::Tensor activation_backward(Activation activation, const at::Tensor& grad, const at::Tensor& before) {
  if (activation == Activation::kGelu) return at::gelu_backward(grad, before);
  return activation == Activation::kRelu ? at::threshold_backward(grad, before, 0) : grad;
}

// out = a b, which is returned. Of bfloat16 as the library takes it: sums in float32, factors and the result rounded.
at::Tensor product_into(const Call& call, at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (call.dtype != DType::kBFloat16) return at::mm_out(out, a, b);
  return out.copy_(at::mm(a.to(at::kBFloat16), b.to(at::kBFloat16)));
}

at::Tensor product(const Call& call, const at::Tensor& a, const at::Tensor& b) {
  return product_into(call, at::empty({a.size(0), b.size(1)}, call.result), a, b);
}

// out = W h + bias, which is returned.
at::Tensor linear(const Call& call, size_t l, size_t j, const at::Tensor& h, at::Tensor out) {
  const at::Tensor weight = call.weight(l, j).t();
  const at::Tensor* bias = call.bias(l, j);
  if (bias == nullptr) return product_into(call, out, h, weight);
  if (call.dtype == DType::kBFloat16) return product_into(call, out, h, weight).add_(*bias);
  return at::addmm_out(out, *bias, h, weight);
}

// 1 / |z|, and 0 for nothing.
at::Tensor one_over(const at::Tensor& norm) { return at::reciprocal(norm).masked_fill_(norm.eq(0), 0); }

template <typename Device>
void run_large(const Call& call, const at::Tensor& kept_array, const Tensors& outputs) {
  const std::vector<Kept> kept = take_apart(call, kept_array);
  if (call.normalize) make_norms<Device>(call, kept);
  std::vector<DecodeHead> heads;
  Tensors alive;  // what heads point to
  for (size_t l = 0; l < call.layers(); ++l) {
    at::Tensor h = call.normalize ? at::mul(call.inputs[l], one_over(kept[l].norm)) : call.inputs[l], out = outputs[l];
    for (size_t j = 0; j + 1 < call.maps; ++j) h = activated(call.activation, linear(call, l, j, h, kept[l].before[j]));
    h = linear(call, l, call.maps - 1, h, call.bases.empty() ? out : kept[l].coefficients);
    if (call.bases.empty()) {
      if (call.normalize) out.mul_(kept[l].norm);
      continue;
    }
    if (call.normalize) h = at::mul(h, kept[l].norm);
    if (call.batch > Device::kHeadBatch) {
      product_into(call, out, h, call.bases[l]);
      continue;
    }
    const at::Tensor basis = call.bases[l].contiguous();
    alive.push_back(h), alive.push_back(basis);
    heads.push_back({basis.size(0), basis.size(1), basis.size(1), basis.const_data_ptr(), h.const_data_ptr(),
                     out.mutable_data_ptr()});
  }
  if (!heads.empty()) Device::heads(call, {heads.data(), static_cast<int64_t>(heads.size()), call.batch});
}

template <typename Device>
std::tuple<Tensors, at::Tensor> forward(at::TensorList inputs, at::TensorList weights, at::TensorList biases,
                                        at::TensorList bases, std::string_view activation, bool normalize) {
  TORCH_CHECK(!inputs.empty(), "decode: at least one layer");
  const c10::DeviceGuard guard(inputs[0].device());
  const Call call = prepare(inputs, weights, biases, bases, activation, normalize);
  Tensors outputs;
  for (size_t l = 0; l < call.layers(); ++l) outputs.push_back(at::empty({call.batch, call.size(l)}, call.result));
  const at::Tensor kept = at::empty({call.kept_size()}, call.result);
  call.batch <= kSmallBatch ? run_small<Device>(call, kept, outputs) : run_large<Device>(call, kept, outputs);
  return {std::move(outputs), kept};
}

struct Gradients {
  Tensors inputs, weights, biases, bases;
};
struct Wanted {
  bool inputs, weights, bases;
};

void layer_backward(const Call& call, size_t l, at::Tensor g, const Kept& kept, const Wanted& wanted, Gradients& to) {
  const at::Tensor inverse = call.normalize ? one_over(kept.norm) : at::Tensor();
  Tensors hidden{call.normalize ? at::mul(call.inputs[l], inverse) : call.inputs[l]};
  for (const at::Tensor& before : kept.before) hidden.push_back(activated(call.activation, before));
  if (!call.bases.empty()) {
    const at::Tensor& c = kept.coefficients;
    if (wanted.bases) to.bases.push_back(product(call, (call.normalize ? at::mul(c, kept.norm) : c).t(), g));
    if (!wanted.inputs && !wanted.weights) return;
    g = product(call, g, call.bases[l].t());
  }
  at::Tensor to_norm;
  if (call.normalize) {
    if (wanted.inputs) {
      const at::Tensor c = call.bases.empty()
                               ? linear(call, l, call.maps - 1, hidden.back(), at::empty(g.sizes(), call.result))
                               : kept.coefficients;
      to_norm = at::mul(g, c).sum(1, /*keepdim=*/true);
    }
    g = at::mul(g, kept.norm);
  }
  const size_t start = l * call.maps;
  for (size_t j = call.maps; j-- > 0;) {
    if (wanted.weights) {
      to.weights[start + j] = product(call, g.t(), hidden[j]);
      if (call.bias(l, j) != nullptr) to.biases[start + j] = g.sum(0);
    }
    if (j > 0 || wanted.inputs) g = product(call, g, call.weight(l, j));
    if (j > 0) g = activation_backward(call.activation, g, kept.before[j - 1]);
  }
  if (!wanted.inputs) return;
  if (call.normalize) {  // of z / |z| across it, of |z| along it
    const at::Tensor& u = hidden[0];
    g = at::mul(at::addcmul(g, u, at::mul(g, u).sum(1, true), -1), inverse).addcmul_(u, to_norm);
  }
  to.inputs.push_back(g);
}

std::tuple<Tensors, Tensors, Tensors, Tensors> backward(at::TensorList grads, at::TensorList inputs,
                                                        at::TensorList weights, at::TensorList biases,
                                                        at::TensorList bases, const at::Tensor& kept_array,
                                                        std::string_view activation, bool normalize, bool to_inputs,
                                                        bool to_weights, bool to_bases) {
  TORCH_CHECK(!inputs.empty() && grads.size() == inputs.size(),
              "decode: as many gradients as layers, and at least one");
  const c10::DeviceGuard guard(inputs[0].device());
  const Call call = prepare(inputs, weights, biases, bases, activation, normalize);
  const std::vector<Kept> kept = take_apart(call, kept_array);
  Gradients to;
  to.weights.resize(to_weights ? weights.size() : 0), to.biases.resize(to_weights ? biases.size() : 0);
  for (size_t l = 0; l < call.layers(); ++l) {
    TORCH_CHECK(
        grads[l].sizes() == at::IntArrayRef({call.batch, call.size(l)}) && grads[l].device() == inputs[0].device(),
        "decode: gradients must be of the outputs' shapes");
    layer_backward(call, l, call.wide(grads[l]), kept[l], {to_inputs, to_weights, to_bases && !bases.empty()}, to);
  }
  return {std::move(to.inputs), std::move(to.weights), std::move(to.biases), std::move(to.bases)};
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("decode", &forward<OnCpu>);
  library.impl("decode_backward", &backward);
}

#ifdef R2F_WITH_CUDA
TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("decode", &forward<OnCuda>);
  library.impl("decode_backward", &backward);
}
#endif

}  // namespace
}  // namespace r2f
