// Tangents of LoRA-factor gradients: what the kernels are asked. No torch and no CUDA here;
// csrc/torch/lora_grad_tangent.cpp fills it in.
#pragma once

#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// For each group p and direction k, in which x_p moves by dx_kp and delta_p by ddelta_kp (arrays as in lora_grad.h):
//   grad_B = scale (ddelta^T U + delta^T dU)    U = x A^T        dU = dx A^T
//   grad_A = scale (dV^T x + V^T dx)            V = delta B      dV = ddelta B
struct LoraGradTangentArgs {
  int64_t groups = 0, directions = 0, tokens = 0, d_in = 0, d_out = 0, rank = 0;
  const void* x = nullptr;       // [groups, tokens, d_in]
  const void* delta = nullptr;   // [groups, tokens, d_out]
  const void* dx = nullptr;      // [directions, groups, tokens, d_in]; null: 0
  const void* ddelta = nullptr;  // [directions, groups, tokens, d_out]; null: 0
  const void* A = nullptr;       // [rank, d_in], or one per group
  const void* B = nullptr;       // [d_out, rank], or one per group; null: B = 0, and grad_A is not computed
  bool A_per_group = false, B_per_group = false;
  double scale = 1;
  void* grad_A = nullptr;  // [directions, groups, rank, d_in], with B only
  void* grad_B = nullptr;  // [directions, groups, d_out, rank]
};

// Items first <= i < last on the calling thread: item i is group i / directions, direction i % directions.
void lora_grad_tangent_cpu(DType dtype, const LoraGradTangentArgs& args, int64_t first, int64_t last);

// All, queued on `stream` (a cudaStream_t). `workspace` is device memory for lora_grad_tangent_cuda_workspace(args)
// elements of the accumulation type. Returns null, or what CUDA said went wrong.
const char* lora_grad_tangent_cuda(DType dtype, const LoraGradTangentArgs& args, void* workspace, void* stream);
inline int64_t lora_grad_tangent_cuda_workspace(const LoraGradTangentArgs& args) {
  const int64_t factors = args.groups * args.tokens * args.rank;  // U or V, and those of all directions
  return factors * (1 + args.directions) * (args.B == nullptr ? 1 : 2);
}

}  // namespace r2f
