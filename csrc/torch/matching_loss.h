// What matching_loss.cpp offers to matching_loss_autograd.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

namespace r2f {

// grad_candidate and grad_images: the gradients of the sum of all losses, in the accumulation type; grad_images of size
// 0 without images.
struct MatchingBothWays {
  at::Tensor loss, sums;
  std::vector<at::Tensor> grad_candidate;
  at::Tensor grad_images;
};

// Forward and backward together, each element read from memory once where the kind of loss allows that.
MatchingBothWays matching_loss_both_ways_on_cpu(at::TensorList candidate, at::TensorList observed,
                                                at::ArrayRef<double> weights, std::string_view kind,
                                                const std::optional<at::Tensor>& images, double tv_weight,
                                                bool isotropic);

}  // namespace r2f
