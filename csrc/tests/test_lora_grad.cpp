// lora_grad against a plain double loop. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the CUDA
// source run by the emulator. "quick" as an argument: fewer shapes (for the sanitizers).
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/lora_grad.h"

namespace r2f::test {
namespace {

struct Case {
  int64_t groups, tokens, d_in, d_out, rank;
};

// Rows of the groups: all the same, or some more, some fewer and some none.
std::vector<int64_t> offsets_of(const Case& c, bool ragged) {
  std::vector<int64_t> offsets{0};
  for (int64_t p = 0; p < c.groups; ++p)
    offsets.push_back(offsets.back() + (!ragged      ? c.tokens
                                        : p % 3 == 1 ? 0
                                        : p % 3 == 2 ? c.tokens / 2
                                                     : c.tokens + p));
  return offsets;
}

enum class BKind { kNone, kShared, kPerGroup };

void run(DType dtype, const LoraGradArgs& args) {
#ifdef R2F_TEST_EMULATED
  std::mt19937 random;
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Array workspace(accumulation, lora_grad_cuda_workspace(args), random, false);
  if (const char* error = lora_grad_cuda(dtype, args, workspace.data(), nullptr)) throw std::runtime_error(error);
#else
  static int turn = 0;
  if (++turn % 3 == 0) {  // whole groups, in two parts as two threads would
    lora_grad_cpu(dtype, args, 0, args.groups / 2);
    lora_grad_cpu(dtype, args, args.groups / 2, args.groups);
    return;
  }
  std::mt19937 random;
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Array workspace(accumulation, lora_grad_cpu_workspace(args), random, false);
  const int64_t items = lora_grad_cpu_items(args);
  lora_grad_cpu_factors(dtype, args, workspace.data(), 0, args.rows / 3);
  lora_grad_cpu_factors(dtype, args, workspace.data(), args.rows / 3, args.rows);
  lora_grad_cpu_sums(dtype, args, workspace.data(), 0, items / 2);
  lora_grad_cpu_sums(dtype, args, workspace.data(), items / 2, items);
#endif
}

int check(DType dtype, const Case& c, BKind b_kind, bool A_per_group, bool step, bool ragged) {
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto [P, N, I, O, R] = c;
  const bool with_B = b_kind != BKind::kNone, B_per_group = b_kind == BKind::kPerGroup;
  const std::vector<int64_t> offsets = offsets_of(c, ragged);
  const int64_t M = offsets.back();
  std::mt19937 random(static_cast<unsigned>(P + 10 * N + 100 * I + 1000 * O + 10000 * R));
  Array x(dtype, M * I, random), delta(dtype, M * O, random), A(dtype, (A_per_group ? P : 1) * R * I, random);
  Array B(dtype, with_B ? (B_per_group ? P : 1) * O * R : 0, random);
  Array grad_A(accumulation, P * R * I, random, false), grad_B(accumulation, P * O * R, random, false);
  Array A1(accumulation, P * R * I, random, false), B1(accumulation, P * O * R, random, false);

  LoraGradArgs args;
  args.groups = P, args.rows = M, args.d_in = I, args.d_out = O, args.rank = R, args.scale = 0.5, args.lr = 0.25;
  args.x = x.data(), args.delta = delta.data(), args.A = A.data(), args.B = with_B ? B.data() : nullptr;
  if (ragged) args.offsets = offsets.data();
  args.A_per_group = A_per_group, args.B_per_group = B_per_group;
  args.grad_A = grad_A.data(), args.grad_B = grad_B.data();
  if (step) args.A1 = A1.data(), args.B1 = B1.data();

  const auto at = [](const Array& m, int64_t i) { return m.values[static_cast<size_t>(i)]; };
  std::vector<double> want_A(static_cast<size_t>(P * R * I)), want_B(static_cast<size_t>(P * O * R)), want_A1, want_B1;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t a0 = A_per_group ? p * R * I : 0, b0 = B_per_group ? p * O * R : 0;
    for (int64_t n = offsets[static_cast<size_t>(p)]; n < offsets[static_cast<size_t>(p) + 1]; ++n) {
      const int64_t x0 = n * I, d0 = n * O;
      for (int64_t j = 0; j < R; ++j) {
        double u = 0, v = 0;
        for (int64_t i = 0; i < I; ++i) u += at(x, x0 + i) * at(A, a0 + j * I + i);
        for (int64_t o = 0; o < O; ++o) want_B[static_cast<size_t>((p * O + o) * R + j)] += 0.5 * at(delta, d0 + o) * u;
        if (!with_B) continue;
        for (int64_t o = 0; o < O; ++o) v += at(delta, d0 + o) * at(B, b0 + o * R + j);
        for (int64_t i = 0; i < I; ++i) want_A[static_cast<size_t>((p * R + j) * I + i)] += 0.5 * v * at(x, x0 + i);
      }
    }
    for (int64_t k = 0; k < R * I; ++k)
      want_A1.push_back(at(A, a0 + k) - 0.25 * want_A[static_cast<size_t>(p * R * I + k)]);
    for (int64_t k = 0; k < O * R; ++k)
      want_B1.push_back((with_B ? at(B, b0 + k) : 0) - 0.25 * want_B[static_cast<size_t>(p * O * R + k)]);
  }

  int wrong = 0;
  try {
    run(dtype, args);
    wrong += compare("grad_B", grad_B, accumulation, want_B);
    if (step) wrong += compare("B1", B1, accumulation, want_B1);
    if (with_B) wrong += compare("grad_A", grad_A, accumulation, want_A);
    if (with_B && step) wrong += compare("A1", A1, accumulation, want_A1);
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s P=%lld N=%lld d_in=%lld d_out=%lld r=%lld B=%d A per group=%d step=%d ragged=%d\n",
                name_of(dtype), static_cast<long long>(P), static_cast<long long>(N), static_cast<long long>(I),
                static_cast<long long>(O), static_cast<long long>(R), static_cast<int>(b_kind), A_per_group, step,
                ragged);
  return wrong;
}

// Each edge of a tile, a block of registers, a vector and a shared-memory tile is crossed by one of these.
const Case kCases[] = {
    {2, 5, 33, 17, 8},    {1, 1, 1, 1, 1},      {3, 7, 64, 48, 1},   {2, 24, 128, 96, 2},  {2, 25, 31, 65, 3},
    {2, 23, 129, 127, 4}, {1, 49, 16, 130, 9},  {2, 3, 257, 12, 16}, {1, 65, 40, 260, 17}, {1, 64, 768, 20, 5},
    {1, 2, 1537, 8, 7},   {1, 66, 36, 516, 33}, {1, 9, 20, 28, 64},  {1, 1100, 16, 48, 6}, {3, 13, 64, 192, 14},
    {2, 130, 12, 8, 12},  {5, 4, 128, 128, 70}, {0, 3, 4, 5, 2},     {2, 0, 4, 5, 2},      {2, 3, 0, 5, 2},
    {2, 3, 4, 0, 2},
};

int all(bool quick) {
  int wrong = 0, count = 0;
  for (const Case& c : kCases) {
    if (quick && c.d_in * c.d_out * c.rank > 200000) continue;
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      for (BKind b : {BKind::kNone, BKind::kShared, BKind::kPerGroup}) {
        const bool per_group = b == BKind::kPerGroup || count % 5 == 0, step = count % 2 == 0;
        wrong += check(dtype, c, b, per_group, step, false) + check(dtype, c, b, per_group, !step, true);
        count += 2;
      }
    }
  }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
