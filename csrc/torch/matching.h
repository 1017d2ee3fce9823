// Shared by matching_loss and factored_matching_loss on the torch side: the kind of loss by name, losses as tensors,
// and the images whose total variation is a term of the loss.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "kernels/matching_loss.h"
#include "torch/glue.h"

namespace r2f::glue {

using Doubles = std::vector<double>;

inline MatchingKind matching_kind(const char* op, std::string_view name) {
  if (name == "layer_cosine") return MatchingKind::kLayerCosine;
  if (name == "cosine") return MatchingKind::kCosine;
  TORCH_CHECK(name == "l2", op, ": kind must be layer_cosine, cosine or l2");
  return MatchingKind::kL2;
}

// [T] numbers of any floating dtype on the CPU, as float64.
inline Doubles to_doubles(const at::Tensor& numbers) {
  const at::Tensor wide = numbers.to(at::kDouble).contiguous();
  const double* data = static_cast<const double*>(wide.const_data_ptr());
  return {data, data + wide.numel()};
}

inline at::Tensor from_doubles(const Doubles& numbers, at::TensorOptions options) {
  const at::Tensor result = at::empty({static_cast<int64_t>(numbers.size())}, options);
  if (options.dtype() == at::kDouble)
    std::copy(numbers.begin(), numbers.end(), static_cast<double*>(result.mutable_data_ptr()));
  else
    std::copy(numbers.begin(), numbers.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

// The sums [layers, trials, 4] that a forward returned, checked, for its backward.
inline const MatchingSums* checked_sums(const char* op, const at::Tensor& sums, const at::Tensor& grad_loss,
                                        int64_t layers, int64_t trials, const at::Device& device) {
  TORCH_CHECK(sums.is_contiguous() && sums.scalar_type() == at::kDouble && sums.device() == device &&
                  sums.sizes() == at::IntArrayRef({layers, trials, 4}),
              op, ": sums must be what the forward returned");
  TORCH_CHECK(grad_loss.sizes() == at::IntArrayRef({trials}) && grad_loss.device() == device, op,
              ": grad_loss must be [T]");
  return static_cast<const MatchingSums*>(sums.const_data_ptr());
}

// Contiguous images and their description. `weight` and `gradient` are set for the CUDA kernels only.
struct Images : MatchingImages {
  at::Tensor pixels;
};

inline Images prepare_images(const char* op, const at::Tensor& images, int64_t trials, const at::Device& device,
                             bool isotropic) {
  TORCH_CHECK(images.dim() == 4 && images.size(0) == trials, op, ": images must be [T, c, h, w] with the gradients' T");
  TORCH_CHECK(images.device() == device, op, ": all tensors must be on one device");
  Images result;
  result.pixels = images.contiguous(), result.dtype = dtype_of(op, images);
  result.args = {result.pixels.const_data_ptr(), trials, images.size(1), images.size(2), images.size(3), isotropic};
  return result;
}

inline at::Tensor empty_gradient(const Images& images) {
  return at::empty(images.pixels.sizes(), result_options(images.pixels));
}

// losses[t] += weight * (sum of the values of trial t's planes)
inline void add_planes(const TotalVariationArgs& args, const Doubles& plane_values, double weight, double* losses) {
  for (int64_t plane = 0; plane < args.planes(); ++plane)
    losses[plane / args.channels] += weight * plane_values[static_cast<size_t>(plane)];
}

#ifdef R2F_WITH_CUDA
// Memory for the CUDA kernels.
inline at::Tensor workspace_for(const MatchingArgs& args, const Images& images) {
  return at::empty({matching_cuda_workspace(args, images)}, images.pixels.options().dtype(at::kByte));
}

// [T] numbers as the CUDA kernels take them.
inline TrialNumbers trial_numbers(const at::Tensor& numbers) { return {numbers.data_ptr(), numbers.stride(0)}; }
#endif

}  // namespace r2f::glue
