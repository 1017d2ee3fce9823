// Distances of factored gradients G = delta^T x, never written out, to observed ones: what the kernels are asked. No
// torch and no CUDA here; csrc/torch/factored_matching_loss.cpp fills it in.
#pragma once

#include <cstdint>

#include "kernels/matching_terms.h"
#include "r2f/dtype.h"

namespace r2f {

// Deltas are loss gradients, tiny in float32: the kernels see them times this power of two (so exactly), which keeps
// squares of 1e-28 to 1e9 in range. float64 needs no such help.
constexpr double delta_unit(DType dtype) { return dtype == DType::kFloat64 ? 1.0 : 4294967296.0; }

// One layer. All arrays are row-major and contiguous, of the accumulation type; deltas are in units. The observed
// gradient is either dense, G*, or factored, x* and delta* with M tokens; it has one item a trial, or one for all.
struct FactoredLayer {
  int64_t tokens = 0, d_in = 0, d_out = 0;
  const void* x = nullptr;      // [trials, tokens, d_in]
  const void* delta = nullptr;  // [trials, tokens, d_out]
  bool observed_is_shared = false;
  const void* observed = nullptr;  // dense: [d_out, d_in]
  const void* product = nullptr;   // dense: delta G* [trials, tokens, d_in], in units
  int64_t observed_tokens = 0;
  const void* observed_x = nullptr;      // factored: [M, d_in]
  const void* observed_delta = nullptr;  // factored: [M, d_out]
  void* grad_x = nullptr;                // backward: [trials, tokens, d_in]
  void* grad_delta = nullptr;            // backward: [trials, tokens, d_out]; dense: holds x G*^T when it begins
};

// The sums of one layer and trial. With P = delta G*, X = x x^T, D = delta delta^T (and starred):
//   <G, G*> = sum P o x, or sum (delta delta*^T) o (x x*^T)     |G|^2 = sum D o X     |G*|^2 likewise, or by elements
//   |G - G*|^2 from these three: it cancels where G comes close to G*
R2F_HOST_DEVICE MatchingSums factored_sums(double inner, double candidate, double observed) {
  const double square = candidate < 0 ? 0 : candidate;  // rounding; NaN stays
  const double difference = square - 2 * inner + observed;
  return {inner, square, observed, difference < 0 ? 0 : difference};
}

// Items first <= item < last; item = layer * trials + trial.
void factored_sums_cpu(DType dtype, const FactoredLayer* layers, int64_t trials, int64_t first, int64_t last,
                       MatchingSums* sums);
// grad_x = a P + b D x and grad_delta = a x G*^T + b X delta, with a, b the coefficients of observed and candidate.
void factored_backward_cpu(DType dtype, const FactoredLayer* layers, int64_t trials,
                           const MatchingCoefficients* coefficients, int64_t first, int64_t last);

// On CUDA the Gram matrices and products of one layer are the library's; what is left are sums and factors.

// A sum over the elements of a o b for each trial: a and b [trials, size], or [size] for all.
struct FactoredPair {
  const void *a = nullptr, *b = nullptr;
  int64_t size = 0;
  bool shared = false;
  double factor = 1;
};

// The sums [trials] of one layer from three pairs: |G|^2, <G, G*>, |G*|^2. `workspace`: device memory for as many
// float64 numbers as factored_sums_cuda_workspace says. Both functions queue their work on `stream` (a cudaStream_t)
// and return null, or what CUDA said went wrong.
const char* factored_sums_cuda(DType dtype, const FactoredPair* pairs, int64_t trials, MatchingSums* sums,
                               double* workspace, void* stream);
int64_t factored_sums_cuda_workspace(const FactoredPair* pairs, int64_t trials);
// out = factor * coefficient * in for each trial [size]; the coefficient is that of observed or of candidate.
const char* factored_scale_cuda(DType dtype, const void* in, void* out, int64_t size, int64_t trials,
                                const MatchingCoefficients* coefficients, bool observed, double factor, void* stream);

}  // namespace r2f
