// Shared by the two kernels of factored_matching_loss: terse checks of its arguments.
#pragma once

#include "torch/matching.h"

namespace r2f::glue {

inline void check_factored_layer(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& observed,
                                 const at::Tensor& first) {
  TORCH_CHECK(x.dim() == 3 && delta.dim() == 3 && x.size(0) == first.size(0) && x.size(0) == delta.size(0) &&
                  x.size(1) == delta.size(1),
              "factored_matching_loss: x must be tensors [T, N, d_in] and delta [T, N, d_out]");
  TORCH_CHECK(observed.dim() == 3 && (observed.size(0) == x.size(0) || observed.size(0) == 1),
              "factored_matching_loss: observed must be tensors [T, ., .] or [1, ., .]");
  for (const at::Tensor& t : {x, delta, observed})
    TORCH_CHECK(t.scalar_type() == first.scalar_type() && t.device() == first.device(),
                "factored_matching_loss: one dtype and one device");
}

inline void check_factored(at::TensorList x, at::TensorList delta, at::TensorList observed,
                           at::ArrayRef<double> weights) {
  const size_t count = x.size();
  TORCH_CHECK(count > 0 && delta.size() == count && observed.size() == count && weights.size() == count,
              "factored_matching_loss: as many x as delta, observed and weights, and at least one");
  for (size_t l = 0; l < count; ++l) {
    check_factored_layer(x[l], delta[l], observed[l], x[0]);
    TORCH_CHECK(observed[l].size(1) == delta[l].size(2) && observed[l].size(2) == x[l].size(2),
                "factored_matching_loss: observed must be tensors [T, d_out, d_in] or [1, d_out, d_in]");
  }
}

}  // namespace r2f::glue
