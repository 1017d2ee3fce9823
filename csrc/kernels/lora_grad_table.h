// The table of layers that lora_grad's CUDA kernels get as a parameter.
#pragma once

#include "r2f/cuda.h"

namespace r2f {
namespace {

struct Layer {
  const void *x, *delta, *A;
  float *U, *grad_B;
  int64_t tokens, d_in, d_out;
  int64_t project_tokens;  // per group; in float32 all groups that share A count as one group
  int64_t x_groups, delta_groups, A_groups;
  int64_t first_project, first_accumulate;  // index of the layer's first item of each kernel
  float scale;
  int rank;
  bool adds;
};

constexpr int kMaxLayers = 64;
constexpr int kProjectWarps = 4;  // of a block of the project kernels

struct Table {
  Layer layers[kMaxLayers];
  int count;
  int64_t projects, accumulates;  // items
};
static_assert(sizeof(Table) <= 32764, "the kernel parameters of CUDA 12.1 and newer; older versions take 4 KB");

// Finds the layer that an item belongs to, by binary search: the last layer whose first item is <= item.
template <int64_t Layer::* first>
__device__ __forceinline__ const Layer& layer_of(const Table& table, int64_t item) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.layers[middle].*first <= item ? low : high) = middle;
  }
  return table.layers[low];
}

}  // namespace
}  // namespace r2f
