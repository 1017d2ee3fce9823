// LoRA-factor gradients for many groups: what the kernels are asked. No torch and no CUDA here;
// csrc/torch/lora_grad.cpp fills it in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// For each group p (all arrays row-major and contiguous within a group, of one DType; results in its accumulation
// type):
//   U = x_p A^T [tokens, rank]            grad_B = scale delta_p^T U [d_out, rank]       B1 = B - lr grad_B
//   V = delta_p B [tokens, rank]          grad_A = scale V^T x_p     [rank, d_in]        A1 = A - lr grad_A
//
// The rows of all groups lie one after another, `rows` in all. Without `offsets` each group has rows / groups of them;
// with offsets [groups + 1], group p has the rows offsets[p] <= row < offsets[p + 1]. The CPU kernel trusts them; the
// CUDA kernel, which reads them on the device, cuts them to what exists.
struct LoraGradArgs {
  int64_t groups = 0, rows = 0, d_in = 0, d_out = 0, rank = 0;
  const int64_t* offsets = nullptr;
  const void* x = nullptr;      // [rows, d_in]
  const void* delta = nullptr;  // [rows, d_out]
  const void* A = nullptr;      // [rank, d_in], or one per group
  const void* B = nullptr;      // [d_out, rank], or one per group; null: B = 0, and grad_A and A1 are not computed
  bool A_per_group = false, B_per_group = false;
  double scale = 1, lr = 0;
  void* grad_A = nullptr;  // [groups, rank, d_in], with B only
  void* grad_B = nullptr;  // [groups, d_out, rank]
  void* A1 = nullptr;      // null: no step wanted (both)
  void* B1 = nullptr;

  int64_t first_row(int64_t p) const {  // of group p; for p = groups, the end of all
    if (offsets != nullptr) return offsets[p];
    return groups == 0 ? 0 : p * (rows / groups);
  }
  // The first group that starts at `row` or later.
  int64_t first_group_from(int64_t row) const {
    if (offsets != nullptr) return std::lower_bound(offsets, offsets + groups, row) - offsets;
    const int64_t tokens = groups == 0 ? 0 : rows / groups;
    return tokens == 0 ? 0 : (row + tokens - 1) / tokens;
  }
};

// On the calling thread, any rank: groups first <= p < last.
void lora_grad_cpu(DType dtype, const LoraGradArgs& args, int64_t first, int64_t last);

// The same in two steps, for groups too few or too unequal to be shared out among threads whole: all factors U and V
// into `workspace`, lora_grad_cpu_workspace(args) elements of the accumulation type, by rows; then the results, by
// items.
void lora_grad_cpu_factors(DType dtype, const LoraGradArgs& args, void* workspace, int64_t first_row, int64_t last_row);
void lora_grad_cpu_sums(DType dtype, const LoraGradArgs& args, const void* workspace, int64_t first_item,
                        int64_t last_item);
int64_t lora_grad_cpu_items(const LoraGradArgs& args);
inline int64_t lora_grad_cpu_workspace(const LoraGradArgs& args) {
  return args.rows * ((args.rank + 7) / 8 * 8) * (args.B == nullptr ? 1 : 2);
}

// All groups, queued on `stream` (a cudaStream_t). Any rank. `workspace` is device memory for
// lora_grad_cuda_workspace(args) elements of the accumulation type. Returns null, or what CUDA said went wrong.
const char* lora_grad_cuda(DType dtype, const LoraGradArgs& args, void* workspace, void* stream);
inline int64_t lora_grad_cuda_workspace(const LoraGradArgs& args) {
  return args.rows * args.rank * (args.B == nullptr ? 1 : 2);  // U, and V with B
}

}  // namespace r2f
