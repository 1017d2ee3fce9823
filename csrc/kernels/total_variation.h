// Total variation of images, one term of the matching losses: the arguments of the kernels. On CUDA it is computed by
// the kernels of matching_loss. No torch and no CUDA here.
#pragma once

#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// Differences of neighbors, dy = x[i + 1][j] - x[i][j] and dx = x[i][j + 1] - x[i][j], of each trial's image:
//   anisotropic   mean |dy| + mean |dx|, each over the pairs of neighbors
//   isotropic     mean over pixels of sqrt(dx^2 + dy^2 + kTotalVariationEps), dx = 0 in the last column and dy = 0 in
//                 the last row
struct TotalVariationArgs {
  const void* images = nullptr;  // [trials, channels, height, width], contiguous
  int64_t trials = 0, channels = 0, height = 0, width = 0;
  bool isotropic = false;

  int64_t planes() const { return trials * channels; }
};

constexpr double kTotalVariationEps = 1e-12;  // keeps the gradient of a flat image finite (it is 0)

// The factors that turn sums into means; 0 where there are no pairs.
struct TotalVariationUnits {
  double row, column, pixel;
};
inline TotalVariationUnits total_variation_units(const TotalVariationArgs& args) {
  const auto one_over = [](int64_t count) { return count > 0 ? 1.0 / static_cast<double>(count) : 0.0; };
  const int64_t rows = args.channels * args.height, columns = args.channels * args.width;
  return {one_over(columns * (args.height - 1)), one_over(rows * (args.width - 1)), one_over(rows * args.width)};
}

// Planes first <= plane < last (a plane: one channel of one trial). A trial's value is the sum over its planes.
void total_variation_cpu(DType dtype, const TotalVariationArgs& args, int64_t first, int64_t last,
                         double* plane_values);
// grad_images, of the accumulation type: the gradient of sum_t weight grads[t] value[t].
void total_variation_backward_cpu(DType dtype, const TotalVariationArgs& args, const double* grads, double weight,
                                  void* grad_images, int64_t first, int64_t last);

}  // namespace r2f
