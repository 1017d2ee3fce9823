// The gradients of the LoRA factor B at B = 0 for all layers of a model: the arguments of the CUDA kernels. No torch
// here; csrc/torch/lora_grad.cpp fills the arguments in.
#pragma once

#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// One layer. Arrays are contiguous; per group p of `groups`, with q = p % x_groups:
//   U_q = x_q A[q % A_groups]^T [tokens, rank]        grad_B_p = scale delta[p % delta_groups]^T U_q [d_out, rank]
struct LoraGradLayer {
  int64_t groups = 0, tokens = 0, d_in = 0, d_out = 0, rank = 0;
  int64_t x_groups = 0, delta_groups = 0, A_groups = 1;  // A_groups is 1 or divides x_groups
  const void* x = nullptr;                               // [x_groups, tokens, d_in], float32 or bfloat16
  const void* delta = nullptr;                           // [delta_groups, tokens, d_out]
  const void* A = nullptr;                               // [A_groups, rank, d_in]
  double scale = 1;
  float* grad_B = nullptr;  // [groups, d_out, rank]
  bool adds = false;        // the result is added to what grad_B holds
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
