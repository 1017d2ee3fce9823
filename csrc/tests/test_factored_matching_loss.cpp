// factored_matching_loss against plain double loops. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for
// the CUDA source run by the emulator, which has other parts to test: sums and factors.
#include <exception>
#include <stdexcept>
#include <string>

#include "check.h"
#include "kernels/factored_matching_loss.h"

namespace r2f::test {
namespace {

using Doubles = std::vector<double>;

int compare_sums(const MatchingSums& got, const MatchingSums& want, DType dtype) {
  const double tolerance = dtype == DType::kFloat64 ? 1e-11 : 1e-5, scale = want.candidate + want.observed;
  const double pairs[4][2] = {{got.inner, want.inner},
                              {got.candidate, want.candidate},
                              {got.observed, want.observed},
                              {got.difference, want.difference}};
  for (const auto& pair : pairs)
    if (!(std::fabs(pair[0] - pair[1]) <= tolerance * scale)) {
      std::printf("WRONG sum: %.9g, expected %.9g\n", pair[0], pair[1]);
      return 1;
    }
  return 0;
}

#ifdef R2F_TEST_EMULATED

int check(DType dtype, int64_t trials, const int64_t (&sizes)[3], bool shared) {
  std::mt19937 random(static_cast<unsigned>(trials + sizes[0]));
  std::vector<Array> arrays;
  FactoredPair pairs[3];
  for (int k = 0; k < 3; ++k) {
    const int64_t items = shared && k == 2 ? 1 : trials;
    for (int side = 0; side < 2; ++side) arrays.emplace_back(dtype, items * sizes[k], random);
  }
  std::vector<Doubles> products(3, Doubles(static_cast<size_t>(trials)));
  for (int k = 0; k < 3; ++k) {
    Array &a = arrays[static_cast<size_t>(2 * k)], &b = arrays[static_cast<size_t>(2 * k + (k == 2 ? 0 : 1))];
    pairs[k] = {a.data(), b.data(), sizes[k], shared && k == 2, 0.5 * (k + 1)};
    for (int64_t t = 0; t < trials; ++t)
      for (int64_t i = 0; i < sizes[k]; ++i) {
        const size_t at = static_cast<size_t>((pairs[k].shared ? 0 : t * sizes[k]) + i);
        products[static_cast<size_t>(k)][static_cast<size_t>(t)] += pairs[k].factor * a.values[at] * b.values[at];
      }
  }
  int wrong = 0;
  try {
    std::vector<MatchingSums> sums(static_cast<size_t>(trials));
    Doubles workspace(static_cast<size_t>(factored_sums_cuda_workspace(pairs, trials)), NAN);
    if (const char* error = factored_sums_cuda(dtype, pairs, trials, sums.data(), workspace.data(), nullptr))
      throw std::runtime_error(error);
    for (size_t t = 0; t < sums.size(); ++t)
      wrong += compare_sums(sums[t], factored_sums(products[1][t], products[0][t], products[2][t]), dtype);

    Array &in = arrays[0], out(dtype, trials * sizes[0], random, false);
    std::vector<MatchingCoefficients> coefficients;
    for (int64_t t = 0; t < trials; ++t) coefficients.push_back({1.5 + static_cast<double>(t), -0.5, 0});
    for (bool observed : {true, false}) {
      if (const char* error = factored_scale_cuda(dtype, in.data(), out.data(), sizes[0], trials, coefficients.data(),
                                                  observed, 0.25, nullptr))
        throw std::runtime_error(error);
      Doubles want;
      for (int64_t i = 0; i < trials * sizes[0]; ++i) {
        const MatchingCoefficients& k = coefficients[static_cast<size_t>(i / sizes[0])];
        want.push_back(0.25 * (observed ? k.observed : k.candidate) * in.values[static_cast<size_t>(i)]);
      }
      wrong += compare("scaled", out, dtype, want);
    }
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  return wrong;
}

int all(bool quick) {
  int wrong = 0, count = 0;
  const int64_t sizes[][3] = {{1, 1, 1}, {33, 257, 8193}, {0, 5, 0}, {256, 0, 31}, {8192, 16385, 7}};
  for (const auto& each : sizes)
    for (int64_t trials : {0, 1, 3})
      for (DType dtype : {DType::kFloat32, DType::kFloat64})
        for (bool shared : {false, true}) {
          if (quick && each[1] > 8192) continue;
          wrong += check(dtype, trials, each, shared), ++count;
        }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

#else

struct Case {
  int64_t trials, tokens, observed_tokens, d_in, d_out;
};

// a^T b for tokens x features: [fa, fb].
Doubles outer(const double* a, const double* b, int64_t tokens, int64_t fa, int64_t fb) {
  Doubles result(static_cast<size_t>(fa * fb));
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t i = 0; i < fa; ++i)
      for (int64_t j = 0; j < fb; ++j) result[static_cast<size_t>(i * fb + j)] += a[n * fa + i] * b[n * fb + j];
  return result;
}

int check(DType dtype, const Case& c, bool dense, bool shared) {
  const auto [T, N, M, I, O] = c;
  const int64_t items = shared ? 1 : T;
  const double unit = delta_unit(dtype);
  std::mt19937 random(static_cast<unsigned>(T + 10 * N + 100 * I + 1000 * O));
  Array x(dtype, T * N * I, random), delta(dtype, T * N * O, random), star(dtype, items * O * I, random);
  Array star_x(dtype, items * M * I, random), star_delta(dtype, items * M * O, random);
  Array product(dtype, T * N * I, random, false);
  Array grad_x(dtype, T * N * I, random, false), grad_delta(dtype, T * N * O, random, false);
  for (Array* deltas : {&delta, &star_delta})  // the kernels see them in units
    for (size_t i = 0; i < deltas->values.size(); ++i)
      deltas->set(static_cast<int64_t>(i), 1e-3 * unit * deltas->values[i]);
  Doubles want_x(x.values.size()), want_delta(delta.values.size());
  std::vector<MatchingSums> want;
  std::vector<MatchingCoefficients> factors;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t of = shared ? 0 : t;
    const double *xs = x.values.data() + t * N * I, *ds = delta.values.data() + t * N * O;
    Doubles G = outer(ds, xs, N, O, I), S(star.values.begin() + of * O * I, star.values.begin() + (of + 1) * O * I);
    if (!dense) S = outer(star_delta.values.data() + of * M * O, star_x.values.data() + of * M * I, M, O, I);
    MatchingSums sums;
    for (size_t k = 0; k < G.size(); ++k) {
      const double g = G[k] / unit, s = dense ? S[k] : S[k] / unit;
      sums.inner += g * s, sums.candidate += g * g, sums.observed += s * s;
      G[k] = g, S[k] = s;
    }
    want.push_back(factored_sums(sums.inner, sums.candidate, sums.observed));
    factors.push_back({0.5 + static_cast<double>(t), -0.25, 0});
    for (int64_t n = 0; n < N; ++n)
      for (int64_t o = 0; o < O; ++o)
        for (int64_t i = 0; i < I; ++i) {
          const size_t k = static_cast<size_t>(o * I + i);
          const double to_G = factors.back().observed * S[k] + factors.back().candidate * G[k];
          want_x[static_cast<size_t>((t * N + n) * I + i)] += ds[n * O + o] / unit * to_G;
          want_delta[static_cast<size_t>((t * N + n) * O + o)] += xs[n * I + i] * to_G;
        }
    if (!dense) continue;
    for (int64_t n = 0; n < N; ++n) {
      Doubles to_x(static_cast<size_t>(I)), to_delta(static_cast<size_t>(O));
      for (int64_t o = 0; o < O; ++o)
        for (int64_t i = 0; i < I; ++i) {
          to_x[static_cast<size_t>(i)] += ds[n * O + o] * S[static_cast<size_t>(o * I + i)];
          to_delta[static_cast<size_t>(o)] += xs[n * I + i] * S[static_cast<size_t>(o * I + i)];
        }
      for (int64_t i = 0; i < I; ++i) product.set((t * N + n) * I + i, to_x[static_cast<size_t>(i)]);
      for (int64_t o = 0; o < O; ++o) grad_delta.set((t * N + n) * O + o, to_delta[static_cast<size_t>(o)]);
    }
  }
  FactoredLayer layer;
  layer.tokens = N, layer.d_in = I, layer.d_out = O, layer.x = x.data(), layer.delta = delta.data();
  layer.observed_is_shared = shared, layer.grad_x = grad_x.data(), layer.grad_delta = grad_delta.data();
  if (dense) layer.observed = star.data(), layer.product = product.data();
  if (!dense) layer.observed_tokens = M, layer.observed_x = star_x.data(), layer.observed_delta = star_delta.data();

  std::vector<MatchingSums> sums(static_cast<size_t>(T));
  factored_sums_cpu(dtype, &layer, T, 0, T / 2, sums.data());  // in two parts, as two threads would
  factored_sums_cpu(dtype, &layer, T, T / 2, T, sums.data());
  factored_backward_cpu(dtype, &layer, T, factors.data(), 0, T / 2);
  factored_backward_cpu(dtype, &layer, T, factors.data(), T / 2, T);
  int wrong = 0;
  for (size_t t = 0; t < sums.size(); ++t) wrong += compare_sums(sums[t], want[t], dtype);
  wrong += compare("grad_x", grad_x, dtype, want_x) + compare("grad_delta", grad_delta, dtype, want_delta);
  if (wrong != 0)
    std::printf("  in %s T=%lld N=%lld M=%lld d_in=%lld d_out=%lld dense=%d shared=%d\n", name_of(dtype),
                static_cast<long long>(T), static_cast<long long>(N), static_cast<long long>(M),
                static_cast<long long>(I), static_cast<long long>(O), dense, shared);
  return wrong;
}

int all(bool) {
  // One below, at and past a tile, a block of registers and a vector.
  const Case cases[] = {{1, 1, 1, 1, 1},     {2, 5, 3, 7, 6},    {3, 31, 33, 17, 40}, {1, 32, 64, 64, 65},
                        {2, 65, 34, 33, 16}, {1, 70, 1, 130, 5}, {0, 3, 3, 4, 5},     {2, 0, 3, 4, 5},
                        {2, 3, 0, 4, 5},     {2, 3, 3, 0, 5},    {2, 3, 3, 4, 0},     {1, 33, 2, 150, 97}};
  int wrong = 0, count = 0;
  for (const Case& c : cases)
    for (DType dtype : {DType::kFloat32, DType::kFloat64})
      for (bool dense : {true, false})
        for (bool shared : {true, false}) wrong += check(dtype, c, dense, shared), ++count;
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

#endif

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
