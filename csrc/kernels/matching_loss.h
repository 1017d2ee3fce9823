// Distances between lists of gradients: the arguments of the kernels. No torch and no CUDA here;
// csrc/torch/matching_loss.cpp fills the arguments in.
#pragma once

#include <cstdint>

#include "kernels/matching_terms.h"
#include "kernels/total_variation.h"
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

// Images whose total variation, times `weight`, is added to the losses.
struct MatchingImages {
  DType dtype = DType::kFloat32;
  TotalVariationArgs args;  // the trials of the gradients
  double weight = 0;
  void* gradient = nullptr;  // like the images, of the accumulation type; null if no gradient is computed
};

// The losses of the trials, or their gradients: float64 if the gradients of the layers are, else float32.
struct TrialNumbers {
  void* data;      // gradients only: null if all are 1
  int64_t stride;  // elements from one trial to the next
};

// On CUDA. Each function queues its work on `stream` (a cudaStream_t) and returns null, or CUDA's error message. It
// takes one launch, and more only for more than 64 layers, or if the images have another dtype than the gradients.
//
// The forward is matching_chunk_sums_cuda(), then matching_losses_cuda(), which returns the sums [layers, trials] as
// well; the backward is matching_gradients_cuda(). The first and the last process the layers first <= l < last, and
// with first = 0 also the images, so that the gradients need not all be in memory at once: pointers of other layers are
// not read. A candidate may be overwritten by its own gradient. `workspace`: matching_cuda_workspace() bytes of device
// memory, the same in both calls of the forward.
const char* matching_chunk_sums_cuda(DType dtype, const MatchingArgs& args, int64_t first, int64_t last,
                                     const MatchingImages& images, void* workspace, void* stream);
const char* matching_losses_cuda(DType dtype, const MatchingArgs& args, const MatchingImages& images, void* workspace,
                                 MatchingSums* sums, TrialNumbers losses, void* stream);
const char* matching_gradients_cuda(DType dtype, const MatchingArgs& args, int64_t first, int64_t last,
                                    const MatchingImages& images, const MatchingSums* sums, TrialNumbers grads,
                                    void* workspace, void* stream);
int64_t matching_cuda_workspace(const MatchingArgs& args, const MatchingImages& images);

}  // namespace r2f
