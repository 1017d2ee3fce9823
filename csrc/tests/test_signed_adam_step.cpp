// signed_adam_step against a plain double loop. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the
// CUDA source run by the emulator.
#include <exception>
#include <stdexcept>

#include "check.h"
#include "kernels/signed_adam_step.h"

namespace r2f::test {
namespace {

void run(DType dtype, const SignedAdamArgs& args) {
#ifdef R2F_TEST_EMULATED
  if (const char* error = signed_adam_step_cuda(dtype, args, nullptr)) throw std::runtime_error(error);
#else
  signed_adam_step_cpu(dtype, args, 0, args.size / 3);  // in two parts, as two threads would
  signed_adam_step_cpu(dtype, args, args.size / 3, args.size);
#endif
}

// `offset`: distance in elements of all arrays from an aligned address.
int check(DType dtype, int64_t size, int64_t offset, bool sign, bool box) {
  std::mt19937 random(static_cast<unsigned>(size + offset));
  const int64_t all = size + offset;
  Array image(dtype, all, random), gradient(dtype, all, random), m(dtype, all, random), v(dtype, all, random);
  for (int64_t i = 0; i < all; ++i) v.set(i, std::fabs(v.values[static_cast<size_t>(i)]));
  if (size > 0) gradient.set(offset, 0.0);

  SignedAdamArgs args;
  args.size = size, args.lr = 0.5, args.beta1 = 0.75, args.beta2 = 0.875, args.eps = 1e-3, args.step = 3;
  args.sign = sign;
  if (box) args.low = -0.25, args.high = 0.5;
  std::vector<double> want_image = image.values, want_m = m.values, want_v = v.values;
  for (size_t i = static_cast<size_t>(offset); i < static_cast<size_t>(all); ++i) {
    double g = gradient.values[i];
    if (sign) g = (g > 0) - (g < 0);
    want_m[i] += 0.25 * (g - want_m[i]);
    want_v[i] = 0.875 * want_v[i] + 0.125 * g * g;
    const double root = std::sqrt(want_v[i] / (1 - std::pow(0.875, 3.0)));
    want_image[i] -= 0.5 / (1 - std::pow(0.75, 3.0)) * want_m[i] / (root + 1e-3);
    if (box) want_image[i] = std::fmin(std::fmax(want_image[i], -0.25), 0.5);
  }
  args.image = image.at(offset), args.gradient = gradient.at(offset);
  args.exp_avg = m.at(offset), args.exp_avg_sq = v.at(offset);
  int wrong = 0;
  try {
    run(dtype, args);
    wrong += compare("image", image, dtype, want_image);
    wrong += compare("exp_avg", m, dtype, want_m);
    wrong += compare("exp_avg_sq", v, dtype, want_v);
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s size=%lld offset=%lld sign=%d box=%d\n", name_of(dtype), static_cast<long long>(size),
                static_cast<long long>(offset), sign, box);
  return wrong;
}

int all() {
  int wrong = 0, count = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat64})
    for (int64_t size : {0, 1, 2, 3, 15, 16, 17, 50, 1023, 1025, 2049})
      for (int64_t offset : {0, 1})
        for (bool sign : {true, false})
          for (bool box : {true, false}) wrong += check(dtype, size, offset, sign, box), ++count;
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main() { return r2f::test::all(); }
