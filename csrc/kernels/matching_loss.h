// Distances between lists of gradients: what the kernels are asked. No torch and no CUDA here;
// csrc/torch/matching_loss.cpp fills it in.
#pragma once

#include <cstdint>

#include "kernels/matching_terms.h"
#include "r2f/dtype.h"

namespace r2f {

// One tensor of the lists, row-major and contiguous. Results are of the accumulation type.
struct MatchingLayer {
  const void* candidate = nullptr;  // [trials, size]
  const void* observed = nullptr;   // [trials, size], or [size] for all trials
  bool observed_is_shared = false;
  int64_t size = 0;
  void* grad_candidate = nullptr;  // [trials, size], where gradients are wanted
  void* grad_observed = nullptr;   // like observed; null: not wanted
};

struct MatchingArgs {
  const MatchingLayer* layers = nullptr;
  const double* weights = nullptr;  // [count], on the host; they add up to 1
  int64_t count = 0, trials = 0;
  MatchingKind kind = MatchingKind::kLayerCosine;
};

// Layers are worked off in pieces of this many elements (of each trial). What a piece gives does not depend on who
// works it off.
constexpr int64_t kMatchingPiece = 16384;
inline int64_t matching_pieces(const MatchingLayer& layer) {
  return (layer.size + kMatchingPiece - 1) / kMatchingPiece;
}
inline int64_t matching_pieces(const MatchingArgs& args) {
  int64_t pieces = 0;
  for (int64_t l = 0; l < args.count; ++l) pieces += matching_pieces(args.layers[l]);
  return pieces;
}

// Forward: the pieces' sums [pieces, trials], then the layers' sums [layers, trials] and the losses [trials].
// `with_gradients`: of layers that matching_together() holds of, the candidate's gradient for a loss gradient of 1
// comes with the sums: what is read from memory once serves both.
bool matching_together(MatchingKind kind, const MatchingLayer& layer);
void matching_piece_sums_cpu(DType dtype, const MatchingArgs& args, bool with_gradients, int64_t first, int64_t last,
                             MatchingSums* of_pieces);
void matching_finish_cpu(const MatchingArgs& args, const MatchingSums* of_pieces, MatchingSums* sums, double* losses);
// Backward of pieces first <= piece < last: `coefficients` [layers, trials] from matching_coefficients().
void matching_loss_backward_cpu(DType dtype, const MatchingArgs& args, const MatchingCoefficients* coefficients,
                                int64_t first, int64_t last);

// Both queue their work on `stream` (a cudaStream_t) and return null, or what CUDA said went wrong. Losses and their
// gradients are of the accumulation type. `image_losses`: null, or [trials] float64 terms that are added to the losses
// times `image_weight`.
const char* matching_loss_cuda(DType dtype, const MatchingArgs& args, const double* image_losses, double image_weight,
                               MatchingSums* sums, void* losses, void* workspace, void* stream);
const char* matching_loss_backward_cuda(DType dtype, const MatchingArgs& args, const void* grads,
                                        const MatchingSums* sums, void* workspace, void* stream);
// The last step of the one and the first of the other, for whoever has sums [layers, trials] of his own. `weights`: on
// the host; `workspace`: device memory for one float64 number a layer.
const char* matching_losses_cuda(DType dtype, MatchingKind kind, const double* weights, int64_t layers, int64_t trials,
                                 const MatchingSums* sums, const double* image_losses, double image_weight,
                                 void* losses, double* workspace, void* stream);
const char* matching_coefficients_cuda(DType dtype, MatchingKind kind, const double* weights, int64_t layers,
                                       int64_t trials, const MatchingSums* sums, const void* grads,
                                       MatchingCoefficients* coefficients, double* workspace, void* stream);
// Bytes of device memory that both need as `workspace`.
int64_t matching_loss_cuda_workspace(const MatchingArgs& args);

}  // namespace r2f
