// Decoders of many layers on small batches: what the kernels are asked. No torch and no CUDA here;
// csrc/torch/decode.cpp fills it in, and leaves large batches to the library.
#pragma once

#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

enum class Activation { kGelu, kRelu, kIdentity };  // kGelu: v Phi(v), exact

// One linear map of one layer: v = (W h) / norm + bias, out = act(v) norm; on the CPU out = v norm, and the library's
// vectorised activations follow. All arrays are row-major and contiguous; in, before, out and norms are of the
// accumulation type.
struct DecodeMap {
  int64_t rows = 0, columns = 0;
  const void* weight = nullptr;   // [rows, columns]
  const void* bias = nullptr;     // [rows], or null
  const void* in = nullptr;       // [batch, columns]
  void* before = nullptr;         // v [batch, rows], or null
  void* out = nullptr;            // [batch, rows]
  const void* divisor = nullptr;  // norms [batch], or null for 1. Where a norm is 0, so is its inverse
  const void* factor = nullptr;   // norms [batch], or null for 1
};

// The basis of one layer, or some neighbouring columns of it: out = c basis.
struct DecodeHead {
  int64_t rank = 0, size = 0, stride = 0;
  const void* basis = nullptr;         // [rank, size], rows `stride` elements apart
  const void* coefficients = nullptr;  // [batch, rank], of the accumulation type
  void* out = nullptr;                 // [batch, size], of the accumulation type
};

// The lengths of `batch` rows of the accumulation type.
struct DecodeNorm {
  int64_t columns = 0;
  const void* in = nullptr;  // [batch, columns]
  void* norms = nullptr;     // [batch]
};

// The maps (or heads, or norms) of all layers at one place in their decoders.
template <typename Part>
struct DecodeStage {
  const Part* parts = nullptr;
  int64_t count = 0, batch = 0;
};

// On the CPU an item is some rows of one map, some columns of one head, or one layer's norms; items are counted over
// the parts, and any thread may take items first <= item < last.
int64_t decode_items(const DecodeStage<DecodeMap>& stage);
int64_t decode_items(DType dtype, const DecodeStage<DecodeHead>& stage);
void decode_maps_cpu(DType dtype, const DecodeStage<DecodeMap>& stage, int64_t first, int64_t last);
void decode_heads_cpu(DType dtype, const DecodeStage<DecodeHead>& stage, int64_t first, int64_t last);
void decode_norms_cpu(DType dtype, const DecodeStage<DecodeNorm>& stage, int64_t first, int64_t last);

// Up to how many samples decode_heads_cpu is faster than the library's product: a piece of the basis stays in cache for
// all of them.
constexpr int64_t kDecodeHeadBatchCpu = 64;

// Queue their work on `stream` (a cudaStream_t) and return null, or what CUDA said went wrong.
const char* decode_maps_cuda(DType dtype, const DecodeStage<DecodeMap>& stage, Activation activation, void* stream);
const char* decode_heads_cuda(DType dtype, const DecodeStage<DecodeHead>& stage, void* stream);
const char* decode_norms_cuda(DType dtype, const DecodeStage<DecodeNorm>& stage, void* stream);

}  // namespace r2f
