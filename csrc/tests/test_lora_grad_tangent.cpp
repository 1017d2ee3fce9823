// lora_grad_tangent against plain loops. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the CUDA
// source run by the emulator. "quick" as an argument: fewer shapes (for the sanitizers).
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "check.h"
#include "kernels/lora_grad_tangent.h"

namespace r2f::test {
namespace {

struct Case {
  int64_t groups, directions, tokens, d_in, d_out, rank;
};

enum class BKind { kNone, kShared, kPerGroup };

void run(DType dtype, const LoraGradTangentArgs& args) {
#ifdef R2F_TEST_EMULATED
  std::mt19937 random;
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Array workspace(accumulation, lora_grad_tangent_cuda_workspace(args), random, false);
  if (const char* error = lora_grad_tangent_cuda(dtype, args, workspace.data(), nullptr))
    throw std::runtime_error(error);
#else
  const int64_t items = args.groups * args.directions;  // in two parts, as two threads would
  lora_grad_tangent_cpu(dtype, args, 0, items / 2);
  lora_grad_tangent_cpu(dtype, args, items / 2, items);
#endif
}

// out [c0, c1] += 0.5 a^T b over the rows of two matrices that start at elements a0 and b0.
void add_product(const Array& a, int64_t a0, int64_t c0, const std::vector<double>& b, int64_t b0, int64_t c1,
                 int64_t rows, double* out) {
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < c0; ++i)
      for (int64_t j = 0; j < c1; ++j)
        out[i * c1 + j] +=
            0.5 * a.values[static_cast<size_t>(a0 + n * c0 + i)] * b[static_cast<size_t>(b0 + n * c1 + j)];
}

// rows x w, with w[i][j] at w0 + i * feature_stride + j * rank_stride; one w for each of `groups` blocks in turn, or
// one for all.
std::vector<double> factors(const Array& x, int64_t blocks, int64_t tokens, int64_t features, int64_t rank,
                            const Array& w, int64_t groups, bool per_group, bool by_feature) {
  std::vector<double> u(static_cast<size_t>(blocks * tokens * rank));
  for (int64_t row = 0; row < blocks * tokens; ++row) {
    const int64_t w0 = per_group ? row / tokens % groups * features * rank : 0;
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t i = 0; i < features; ++i)
        u[static_cast<size_t>(row * rank + j)] +=
            x.values[static_cast<size_t>(row * features + i)] *
            w.values[static_cast<size_t>(w0 + (by_feature ? i * rank + j : j * features + i))];
  }
  return u;
}

int check(DType dtype, const Case& c, BKind b_kind, bool A_per_group, bool with_dx, bool with_ddelta) {
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto [P, K, N, I, O, R] = c;
  const bool with_B = b_kind != BKind::kNone, B_per_group = b_kind == BKind::kPerGroup;
  std::mt19937 random(static_cast<unsigned>(P + 10 * N + 100 * I + 1000 * O + 10000 * R));
  Array x(dtype, P * N * I, random), delta(dtype, P * N * O, random), dx(dtype, K * P * N * I, random),
      ddelta(dtype, K * P * N * O, random);
  Array A(dtype, (A_per_group ? P : 1) * R * I, random);
  Array B(dtype, with_B ? (B_per_group ? P : 1) * O * R : 0, random);
  Array grad_A(accumulation, K * P * R * I, random, false), grad_B(accumulation, K * P * O * R, random, false);

  LoraGradTangentArgs args;
  args.groups = P, args.directions = K, args.tokens = N, args.d_in = I, args.d_out = O, args.rank = R, args.scale = 0.5;
  args.x = x.data(), args.delta = delta.data(), args.A = A.data(), args.B = with_B ? B.data() : nullptr;
  args.dx = with_dx ? dx.data() : nullptr, args.ddelta = with_ddelta ? ddelta.data() : nullptr;
  args.A_per_group = A_per_group, args.B_per_group = B_per_group;
  args.grad_A = grad_A.data(), args.grad_B = grad_B.data();

  const auto u = factors(x, P, N, I, R, A, P, A_per_group, false);
  const auto du = factors(dx, K * P, N, I, R, A, P, A_per_group, false);
  std::vector<double> v, dv, want_B(static_cast<size_t>(K * P * O * R)),
      transposed_A(static_cast<size_t>(K * P * R * I)), want_A(transposed_A.size());
  if (with_B) {
    v = factors(delta, P, N, O, R, B, P, B_per_group, true);
    dv = factors(ddelta, K * P, N, O, R, B, P, B_per_group, true);
  }
  for (int64_t block = 0; block < K * P; ++block) {
    const int64_t p = P == 0 ? 0 : block % P;
    double *to_B = want_B.data() + block * O * R, *to_A = transposed_A.data() + block * I * R;
    if (with_ddelta) add_product(ddelta, block * N * O, O, u, p * N * R, R, N, to_B);
    if (with_dx) add_product(delta, p * N * O, O, du, block * N * R, R, N, to_B);
    if (with_B && with_ddelta) add_product(x, p * N * I, I, dv, block * N * R, R, N, to_A);
    if (with_B && with_dx) add_product(dx, block * N * I, I, v, p * N * R, R, N, to_A);
    for (int64_t j = 0; j < R; ++j)
      for (int64_t i = 0; i < I; ++i) want_A[static_cast<size_t>((block * R + j) * I + i)] = to_A[i * R + j];
  }

  int wrong = 0;
  try {
    run(dtype, args);
    wrong += compare("grad_B", grad_B, accumulation, want_B);
    if (with_B) wrong += compare("grad_A", grad_A, accumulation, want_A);
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s P=%lld K=%lld N=%lld d_in=%lld d_out=%lld r=%lld B=%d A per group=%d dx=%d ddelta=%d\n",
                name_of(dtype), static_cast<long long>(P), static_cast<long long>(K), static_cast<long long>(N),
                static_cast<long long>(I), static_cast<long long>(O), static_cast<long long>(R),
                static_cast<int>(b_kind), A_per_group, with_dx, with_ddelta);
  return wrong;
}

const Case kCases[] = {
    {2, 3, 5, 33, 17, 8},   {1, 1, 1, 1, 1, 1},     {1, 2, 65, 64, 48, 3},  {2, 2, 24, 128, 96, 2},
    {1, 2, 66, 31, 140, 9}, {1, 1, 3, 257, 12, 16}, {2, 1, 17, 20, 260, 5}, {1, 2, 9, 20, 28, 33},
    {1, 2, 520, 4, 8, 6},   {3, 2, 65, 16, 36, 4},  {0, 2, 3, 4, 5, 2},     {2, 0, 3, 4, 5, 2},
    {2, 2, 0, 4, 5, 2},     {2, 2, 3, 0, 5, 2},     {2, 2, 3, 4, 0, 2},     {1, 5, 70, 48, 160, 8},
};

int all(bool quick) {
  int wrong = 0, count = 0;
  for (const Case& c : kCases) {
    if (quick && c.directions * c.tokens * c.d_out * c.rank > 60000) continue;
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      for (BKind b : {BKind::kNone, BKind::kShared, BKind::kPerGroup}) {
        const int zero = count % 4;  // 2: dx is zero, 3: ddelta is zero
        wrong += check(dtype, c, b, b == BKind::kPerGroup || count % 5 == 0, zero != 2, zero != 3);
        ++count;
      }
    }
  }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
