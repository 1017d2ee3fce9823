// Helpers of the torch side of every operator: dtypes, and the current CUDA stream without CUDA's headers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <vector>

#include "r2f/dtype.h"

namespace r2f {

using Tensors = std::vector<at::Tensor>;

namespace glue {

inline DType dtype_of(const char* op, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, op, ": float32, float64 or bfloat16 is needed, not ", tensor.scalar_type());
  }
}

// Options of a result: float64 for float64, float32 otherwise.
inline at::TensorOptions result_options(const at::Tensor& tensor) {
  return tensor.options().dtype(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Torch's current stream on the device, read through c10's virtual interface, so that one binary loads in both CPU-only
// and CUDA builds of torch.
inline void* current_stream(const at::Device& device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

inline void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, " failed on CUDA: ", error);
}

// Null for an empty tensor.
inline void* data_or_null(const at::Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
}

}  // namespace glue
}  // namespace r2f
