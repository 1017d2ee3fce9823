// The gradients of the LoRA factor B at B = 0 for all layers of a model: the arguments of the CUDA kernels. No torch
// here; csrc/torch/lora_grad.cpp fills the arguments in.
#pragma once

#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// One layer. Arrays are contiguous; per group p of `groups`:
//   U = x_p A^T [tokens, rank]        grad_B = scale delta_p^T U [d_out, rank]
struct LoraGradLayer {
  int64_t groups = 0, tokens = 0, d_in = 0, d_out = 0, rank = 0;
  const void* x = nullptr;      // [groups, tokens, d_in], float32 or bfloat16
  const void* delta = nullptr;  // [groups, tokens, d_out]
  const void* A = nullptr;      // [rank, d_in], or [groups, rank, d_in]
  bool A_per_group = false;
  double scale = 1;
  float* grad_B = nullptr;  // [groups, d_out, rank]
};

// The bfloat16 kernel multiplies U as a sum of two bfloat16 numbers, so an infinite input gives NaN, not infinity.

// Whether the kernels support a layer: float32 up to rank 16, bfloat16 up to rank 32, rows of whole 16-byte vectors at
// aligned addresses. For larger ranks and in float64 the library's batched products are faster (seen on an H100, no
// record).
bool lora_grad_cuda_takes(DType dtype, const LoraGradLayer& layer);

// Queues all layers on `stream` (a cudaStream_t): two launches for every 64 layers. For every
// layer lora_grad_cuda_takes() must be true. `workspace` is 16-byte aligned device memory for
// lora_grad_cuda_workspace(...) floats. Returns null, or CUDA's error message.
const char* lora_grad_cuda(DType dtype, const LoraGradLayer* layers, int64_t count, float* workspace, void* stream);
int64_t lora_grad_cuda_workspace(DType dtype, const LoraGradLayer* layers, int64_t count);

}  // namespace r2f
