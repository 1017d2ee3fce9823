// The distance between gradients as a function of four sums for each layer and trial, and its derivatives. Shared by
// matching_loss and factored_matching_loss, CPU and CUDA. No torch and no CUDA here.
#pragma once

#include <cmath>
#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// For a layer's candidate gradient c, observed gradient o and weight w (the weights sum to 1):
//   kLayerCosine   sum over layers of w (1 - <c, o> / |c| |o|)
//   kCosine        1 - (sum w <c, o>) / sqrt(sum w |c|^2  sum w |o|^2)
//   kL2            sum over layers of w |c - o|^2
enum class MatchingKind { kLayerCosine, kCosine, kL2 };

// Sums over the elements of one layer and trial, or a weighted total of such sums. In float64, because squares of small
// float32 numbers underflow.
struct MatchingSums {
  double inner = 0, candidate = 0, observed = 0, difference = 0;  // <c, o>, |c|^2, |o|^2, |c - o|^2

  R2F_HOST_DEVICE void add(double weight, const MatchingSums& other) {
    inner += weight * other.inner;
    candidate += weight * other.candidate;
    observed += weight * other.observed;
    difference += weight * other.difference;
  }
};

// The gradient of the loss with respect to c is `observed` * o + `candidate` * c.
struct MatchingCoefficients {
  double observed, candidate;
};

// A gradient of norm 0 has cosine 0 with any other (NaN with NaN), and its derivative is taken as 0.
R2F_HOST_DEVICE bool has_no_cosine(const MatchingSums& sums) { return sums.candidate == 0 || sums.observed == 0; }

R2F_HOST_DEVICE double cosine(const MatchingSums& sums) {
  return has_no_cosine(sums) ? sums.inner : sums.inner / sqrt(sums.candidate) / sqrt(sums.observed);
}

// One layer's term of the loss. 0 for kCosine, whose loss is 1 - cosine(weighted sums of all layers).
R2F_HOST_DEVICE double layer_distance(MatchingKind kind, double weight, const MatchingSums& sums) {
  if (kind == MatchingKind::kCosine) return 0;
  return weight * (kind == MatchingKind::kL2 ? sums.difference : 1 - cosine(sums));
}

// `total`: the weighted sums of all layers, read for kCosine only. `grad`: the gradient of the trial's loss.
R2F_HOST_DEVICE MatchingCoefficients matching_coefficients(MatchingKind kind, double weight, double grad,
                                                           const MatchingSums& layer, const MatchingSums& total) {
  const double factor = grad * weight;
  if (kind == MatchingKind::kL2) return {-2 * factor, 2 * factor};
  const MatchingSums s = kind == MatchingKind::kCosine ? total : layer;
  if (has_no_cosine(s)) return {0, 0};
  const double by_norms = factor / sqrt(s.candidate) / sqrt(s.observed);
  return {-by_norms, by_norms * s.inner / s.candidate};
}

// Host: losses [trials] from the sums [layers, trials].
inline void matching_losses(MatchingKind kind, const double* weights, int64_t layers, int64_t trials,
                            const MatchingSums* sums, double* losses) {
  for (int64_t t = 0; t < trials; ++t) {
    MatchingSums total;
    double distance = 0;
    for (int64_t l = 0; l < layers; ++l) {
      total.add(weights[l], sums[l * trials + t]);
      distance += layer_distance(kind, weights[l], sums[l * trials + t]);
    }
    losses[t] = kind == MatchingKind::kCosine ? 1 - cosine(total) : distance;
  }
}

// Host: coefficients [layers, trials] from the sums [layers, trials] and the losses' gradients [trials].
inline void matching_coefficients(MatchingKind kind, const double* weights, int64_t layers, int64_t trials,
                                  const MatchingSums* sums, const double* grads, MatchingCoefficients* coefficients) {
  for (int64_t t = 0; t < trials; ++t) {
    MatchingSums total;
    for (int64_t l = 0; l < layers; ++l) total.add(weights[l], sums[l * trials + t]);
    for (int64_t l = 0; l < layers; ++l)
      coefficients[l * trials + t] = matching_coefficients(kind, weights[l], grads[t], sums[l * trials + t], total);
  }
}

}  // namespace r2f
