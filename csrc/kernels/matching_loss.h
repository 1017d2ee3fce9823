// Distances between lists of gradients: the arguments of the kernels. No torch and no CUDA here;
// csrc/torch/matching_loss.cpp fills the arguments in.
#pragma once

#include <cstdint>

#include "kernels/matching_terms.h"
#include "r2f/dtype.h"

namespace r2f {

// One tensor of the lists, row-major and contiguous. Gradients have the accumulation type.
struct MatchingLayer {
  const void* candidate = nullptr;  // [trials, size]
  const void* observed = nullptr;   // [trials, size], or [size] for all trials
  bool observed_is_shared = false;
  int64_t size = 0;
  void* grad_candidate = nullptr;  // [trials, size]; null if no gradient is computed
};

struct MatchingArgs {
  const MatchingLayer* layers = nullptr;
  const double* weights = nullptr;  // [count], on the host; they sum to 1. Not read if only sums are computed
  int64_t count = 0, trials = 0;
  MatchingKind kind = MatchingKind::kLayerCosine;
};

// Work is split into chunks of this many elements (of each trial) of a layer. The result of a chunk does not depend on
// the thread that computes it.
constexpr int64_t kMatchingChunk = 16384;
inline int64_t matching_chunks(const MatchingLayer& layer) {
  return (layer.size + kMatchingChunk - 1) / kMatchingChunk;
}
inline int64_t matching_chunks(const MatchingArgs& args) {
  int64_t chunks = 0;
  for (int64_t l = 0; l < args.count; ++l) chunks += matching_chunks(args.layers[l]);
  return chunks;
}

// Forward on the CPU: the sums of each chunk [chunks, trials], for chunks first <= chunk < last. `with_gradients`: for
// the layers for which matching_in_one_pass() is true, also the gradient of the sum of all losses with respect to the
// candidate, from the same pass over memory.
bool matching_in_one_pass(MatchingKind kind, const MatchingLayer& layer);
void matching_chunk_sums_cpu(DType dtype, const MatchingArgs& args, bool with_gradients, int64_t first, int64_t last,
                             MatchingSums* chunk_sums);
// Adds the chunks' sums up to the layers' sums [layers, trials], from which matching_losses() computes the losses
// [trials].
void matching_layer_sums_cpu(const MatchingArgs& args, const MatchingSums* chunk_sums, MatchingSums* sums);
// Backward of chunks first <= chunk < last: `coefficients` [layers, trials] from matching_coefficients().
void matching_loss_backward_cpu(DType dtype, const MatchingArgs& args, const MatchingCoefficients* coefficients,
                                int64_t first, int64_t last);

// On CUDA: both queue their work on `stream` (a cudaStream_t) and return null, or CUDA's error message. Losses and
// their gradients have the accumulation type. `image_losses` [trials], float64: added to the losses, times
// `image_weight`. `workspace`: matching_loss_cuda_workspace() bytes of device memory.
const char* matching_loss_cuda(DType dtype, const MatchingArgs& args, const double* image_losses, double image_weight,
                               MatchingSums* sums, void* losses, void* workspace, void* stream);
const char* matching_loss_backward_cuda(DType dtype, const MatchingArgs& args, const void* grads,
                                        const MatchingSums* sums, void* workspace, void* stream);
// The forward and the backward in two steps each, for gradients that are never all in memory at once. Forward:
// matching_sums_cuda() computes the sums [layers, trials] of some of the layers, then matching_losses_cuda() the losses
// from the sums of all layers. Backward: matching_coefficients_cuda() computes the coefficients [layers, trials] of all
// layers, then matching_gradients_cuda() the gradients of some of the layers. The two functions for some of the layers
// do not read `args.weights` and `args.kind`. A candidate may be overwritten by its own gradient. `weights`: on the
// host; `double* workspace`: device memory for one float64 number a layer.
const char* matching_sums_cuda(DType dtype, const MatchingArgs& args, MatchingSums* sums, void* workspace,
                               void* stream);
const char* matching_gradients_cuda(DType dtype, const MatchingArgs& args, const MatchingCoefficients* coefficients,
                                    void* stream);
const char* matching_losses_cuda(DType dtype, MatchingKind kind, const double* weights, int64_t layers, int64_t trials,
                                 const MatchingSums* sums, const double* image_losses, double image_weight,
                                 void* losses, double* workspace, void* stream);
const char* matching_coefficients_cuda(DType dtype, MatchingKind kind, const double* weights, int64_t layers,
                                       int64_t trials, const MatchingSums* sums, const void* grads,
                                       MatchingCoefficients* coefficients, double* workspace, void* stream);
int64_t matching_loss_cuda_workspace(const MatchingArgs& args);

}  // namespace r2f
