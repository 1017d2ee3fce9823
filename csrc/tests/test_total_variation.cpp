// total_variation against a plain double loop. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the
// CUDA source of matching_loss, which computes it, run by the emulator. The argument "quick" selects fewer shapes (for
// the sanitizers).
#include <exception>
#include <stdexcept>
#include <string>

#include "check.h"
#include "kernels/matching_loss.h"

namespace r2f::test {
namespace {

struct Case {
  int64_t trials, channels, height, width;
};

constexpr double kWeight = 0.5;

// Computes values [trials] and grad_images.
void run(DType dtype, const TotalVariationArgs& args, const std::vector<double>& grads, std::vector<double>& values,
         void* grad_images) {
#ifdef R2F_TEST_EMULATED  // as the losses of no layers
  std::mt19937 random;
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const MatchingArgs none{nullptr, nullptr, 0, args.trials, MatchingKind::kL2};
  const MatchingImages images{dtype, args, kWeight, grad_images};
  for (DType of_losses : {accumulation, dtype}) {  // bfloat16 images with float32 gradients, then with bfloat16 ones
    Array workspace(DType::kFloat64, matching_cuda_workspace(none, images) / 8, random, false);
    Array losses(accumulation, args.trials, random, false), narrow(accumulation, args.trials, random, false);
    for (int64_t t = 0; t < args.trials; ++t) narrow.set(t, grads[static_cast<size_t>(t)]);
    void* memory = workspace.data();
    const char* error = matching_chunk_sums_cuda(of_losses, none, 0, 0, images, memory, nullptr);
    if (error == nullptr)
      error = matching_losses_cuda(of_losses, none, images, memory, nullptr, {losses.data(), 1}, nullptr);
    if (error == nullptr)
      error = matching_gradients_cuda(of_losses, none, 0, 0, images, nullptr, {narrow.data(), 1}, memory, nullptr);
    if (error != nullptr) throw std::runtime_error(error);
    for (int64_t t = 0; t < args.trials; ++t) values[static_cast<size_t>(t)] = losses.get(t) / kWeight;
  }
#else
  const int64_t planes = args.planes(), half = planes / 2;  // in two parts, as two threads would
  std::vector<double> of_planes(static_cast<size_t>(planes));
  total_variation_cpu(dtype, args, half, planes, of_planes.data());
  total_variation_cpu(dtype, args, 0, half, of_planes.data());
  total_variation_backward_cpu(dtype, args, grads.data(), kWeight, grad_images, half, planes);
  total_variation_backward_cpu(dtype, args, grads.data(), kWeight, grad_images, 0, half);
  std::fill(values.begin(), values.end(), 0.0);
  for (int64_t p = 0; p < planes; ++p)
    values[static_cast<size_t>(p / args.channels)] += of_planes[static_cast<size_t>(p)];
#endif
}

int check(DType dtype, const Case& c, bool isotropic) {
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto [T, C, H, W] = c;
  std::mt19937 random(static_cast<unsigned>(T + 10 * C + 100 * H + 10000 * W));
  Array images(dtype, T * C * H * W, random), gradient(accumulation, T * C * H * W, random, false);
  const TotalVariationArgs args{images.data(), T, C, H, W, isotropic};

  std::vector<double> grads, want(static_cast<size_t>(T)), got(static_cast<size_t>(T), NAN);
  std::vector<double> want_gradient(images.values.size());
  for (int64_t t = 0; t < T; ++t) grads.push_back(0.5 + 0.25 * static_cast<double>(t));
  const auto mean = [](int64_t count) { return count > 0 ? 1.0 / static_cast<double>(count) : 0.0; };
  const double by_row = mean(C * (H - 1) * W), by_column = mean(C * H * (W - 1)), by_pixel = mean(C * H * W);
  for (int64_t p = 0; p < T * C * H * W; ++p) {
    const int64_t column = p % W, row = p / W % H;
    const size_t t = static_cast<size_t>(p / (C * H * W)), here = static_cast<size_t>(p);
    const size_t right = here + 1, below = here + static_cast<size_t>(W);
    const bool has_right = column + 1 < W, has_below = row + 1 < H;
    const double dx = has_right ? images.values[right] - images.values[here] : 0;
    const double dy = has_below ? images.values[below] - images.values[here] : 0;
    const double length = std::sqrt(dx * dx + dy * dy + 1e-12), factor = kWeight * grads[t];
    const auto sign = [](double v) { return (v > 0) - (v < 0); };
    const double u = isotropic ? by_pixel * dx / length : by_column * sign(dx);
    const double v = isotropic ? by_pixel * dy / length : by_row * sign(dy);
    want[t] += isotropic ? by_pixel * length : by_column * std::fabs(dx) + by_row * std::fabs(dy);
    want_gradient[here] -= factor * (u + v);
    if (has_right) want_gradient[right] += factor * u;
    if (has_below) want_gradient[below] += factor * v;
  }

  int wrong = 0;
  try {
    run(dtype, args, grads, got, gradient.data());
    wrong += compare("gradient", gradient, accumulation, want_gradient);
    for (size_t t = 0; t < want.size(); ++t)
      if (!(std::fabs(got[t] - want[t]) <= (accumulation == DType::kFloat64 ? 1e-12 : 2e-5))) {
        std::printf("WRONG value [%zu]: %.9g, expected %.9g\n", t, got[t], want[t]);
        ++wrong;
      }
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s T=%lld c=%lld h=%lld w=%lld isotropic=%d\n", name_of(dtype), static_cast<long long>(T),
                static_cast<long long>(C), static_cast<long long>(H), static_cast<long long>(W), isotropic);
  return wrong;
}

// Sizes one below, at and one past a vector, a block and a chunk.
const Case kCases[] = {{2, 3, 6, 5},  {1, 1, 1, 1},   {2, 1, 1, 40},  {2, 2, 40, 1},  {3, 2, 17, 18}, {1, 3, 33, 34},
                       {1, 1, 2, 67}, {2, 1, 64, 64}, {1, 2, 65, 64}, {0, 3, 4, 4},   {2, 0, 4, 4},   {2, 3, 0, 4},
                       {2, 3, 4, 0},  {1, 1, 90, 95}, {5, 1, 3, 3},   {1, 1, 256, 50}};

int all(bool quick) {
  int wrong = 0, count = 0;
  for (const Case& c : kCases)
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16})
      for (bool isotropic : {false, true}) {
        if (quick && c.trials * c.channels * c.height * c.width > 8192) continue;
        wrong += check(dtype, c, isotropic), ++count;
      }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
