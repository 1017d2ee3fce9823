// lora_grad's CUDA source, run by the emulator, against a plain double loop. The argument "quick" selects fewer shapes
// (for the sanitizers).
#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/lora_grad.h"

namespace r2f::test {
namespace {

struct Shape {
  int64_t groups, tokens, d_in, d_out, rank;
};

// What the groups of a layer share. kX and kDelta: groups p, p + n, ... have one x, or one delta; kX also adds.
enum class Shared { kNothing, kA, kX, kDelta };

// A layer's arrays, its description for the kernel, and the expected result.
struct Case {
  Shape shape;
  Array x, delta, A, grad_B;
  LoraGradLayer layer;
  std::vector<double> expected;

  Case(DType dtype, const Shape& s, Shared shared, std::mt19937& random)
      : Case(dtype, s, shared == Shared::kX ? fewer(s.groups) : s.groups,
             shared == Shared::kDelta ? fewer(s.groups) : s.groups,
             shared == Shared::kA         ? 1
             : shared == Shared::kNothing ? std::max<int64_t>(1, s.groups)
                                          : std::max<int64_t>(1, fewer(s.groups)),
             shared == Shared::kX, random) {}

  Case(DType dtype, const Shape& s, int64_t x_groups, int64_t delta_groups, int64_t A_groups, bool adds,
       std::mt19937& random)
      : shape(s),
        x(dtype, x_groups * s.tokens * s.d_in, random),
        delta(dtype, delta_groups * s.tokens * s.d_out, random),
        A(dtype, A_groups * s.rank * s.d_in, random),
        grad_B(DType::kFloat32, s.groups * s.d_out * s.rank, random, adds),
        expected(grad_B.values) {
    layer.groups = s.groups, layer.tokens = s.tokens, layer.d_in = s.d_in, layer.d_out = s.d_out, layer.rank = s.rank;
    layer.x_groups = x_groups, layer.delta_groups = delta_groups, layer.A_groups = A_groups, layer.adds = adds;
    layer.x = x.data(), layer.delta = delta.data(), layer.A = A.data();
    layer.scale = 0.5, layer.grad_B = static_cast<float*>(grad_B.data());
    expected.resize(static_cast<size_t>(s.groups * s.d_out * s.rank));
    if (!adds) expected.assign(expected.size(), 0);
    for (int64_t p = 0; p < s.groups; ++p)
      for (int64_t n = 0; n < s.tokens; ++n)
        for (int64_t j = 0; j < s.rank; ++j) {
          const int64_t q = p % x_groups, d = p % delta_groups;
          double u = 0;
          for (int64_t i = 0; i < s.d_in; ++i)
            u += value(x, (q * s.tokens + n) * s.d_in + i) * value(A, (q % A_groups * s.rank + j) * s.d_in + i);
          for (int64_t o = 0; o < s.d_out; ++o)
            expected[static_cast<size_t>((p * s.d_out + o) * s.rank + j)] +=
                0.5 * value(delta, (d * s.tokens + n) * s.d_out + o) * u;
        }
  }

  static int64_t fewer(int64_t groups) { return groups % 3 == 0 ? groups / 3 : groups % 2 == 0 ? groups / 2 : groups; }

  static double value(const Array& array, int64_t i) { return array.values[static_cast<size_t>(i)]; }
};

int check(DType dtype, const std::vector<Shape>& shapes, Shared shared) {
  std::mt19937 random(static_cast<unsigned>(shapes.size() + 10 * shapes[0].tokens + 100 * shapes[0].rank));
  std::vector<Case> cases;
  std::vector<LoraGradLayer> layers;
  for (size_t l = 0; l < shapes.size(); ++l)  // every third layer shares what the next value of `Shared` says
    cases.emplace_back(dtype, shapes[l], static_cast<Shared>((static_cast<int>(shared) + (l % 3 == 1)) % 4), random);
  for (Case& c : cases) {
    layers.push_back(c.layer);
    if (!lora_grad_cuda_takes(dtype, c.layer)) return std::printf("WRONG: a layer of the test is not taken\n"), 1;
  }
  const auto count = static_cast<int64_t>(layers.size());
  Array workspace(DType::kFloat32, lora_grad_cuda_workspace(dtype, layers.data(), count), random, false);
  int wrong = 0;
  try {
    const char* error = lora_grad_cuda(dtype, layers.data(), count, static_cast<float*>(workspace.data()), nullptr);
    if (error != nullptr) throw std::runtime_error(error);
    for (Case& c : cases) wrong += compare("grad_B", c.grad_B, DType::kFloat32, c.expected);
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s, %zu layers, the first P=%lld N=%lld d_in=%lld d_out=%lld r=%lld, shared=%d\n", name_of(dtype),
                shapes.size(), static_cast<long long>(shapes[0].groups), static_cast<long long>(shapes[0].tokens),
                static_cast<long long>(shapes[0].d_in), static_cast<long long>(shapes[0].d_out),
                static_cast<long long>(shapes[0].rank), static_cast<int>(shared));
  return wrong;
}

// Shapes on both sides of each boundary: token tiles, column stripes, feature steps and rank ranges.
std::vector<std::vector<Shape>> shape_lists(int64_t vector, int64_t max_rank, bool quick) {
  const int64_t v = vector;
  std::vector<std::vector<Shape>> lists = {
      {{2, 5, 2 * v, 3 * v, 8}},
      {{1, 1, v, v, 1}},
      {{2, 33, 128, 128, 2}, {1, 16, 32, 64, 2}},
      {{3, 17, 128 + v, 64 + v, 3}, {0, 3, v, v, 3}, {2, 8, 160, 128 + v, 4}},
      {{2, 65, 16, 24, 7}, {2, 0, v, v, 7}, {2, 3, 0, 2 * v, 8}, {2, 3, v, 0, 5}},
      {{1, 31, 40, 72, 9}, {3, 32, 64, 16, 16}, {1, 70, 8, 136, 1}},
      {{1, 150, 5 * 128 + 2 * v, 64, 5}},  // every warp that shares an item takes several steps
      {{2, 48, 48, 80, max_rank}, {1, 47, 128, 40, max_rank - 3}},
      std::vector<Shape>(70, Shape{1, 3, v, 2 * v, 4}),  // more layers than a table holds
  };
  if (!quick)
    lists.insert(lists.end(), {{{702, 2, v, 3 * 128, 4}}, {{2100, 1, v, v, 4}}});  // enough items for one warp each
  return lists;
}

int all(bool quick) {
  int wrong = 0, count = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const auto& shapes : shape_lists(dtype == DType::kFloat32 ? 4 : 8, dtype == DType::kFloat32 ? 16 : 32, quick))
      for (Shared shared : {Shared::kNothing, Shared::kA, Shared::kX, Shared::kDelta}) {
        wrong += check(dtype, shapes, shared) != 0;
        ++count;
      }
  std::mt19937 random(1);
  Case plain(DType::kFloat32, {1, 2, 8, 8, 4}, Shared::kNothing, random);
  for (int change = 0; change < 5; ++change) {  // layers that the kernels do not support
    LoraGradLayer layer = plain.layer;
    if (change == 0) layer.rank = 17;
    if (change == 1) layer.d_in = 6;
    if (change == 2) layer.d_out = 7;
    if (change == 3) layer.x = static_cast<const float*>(layer.x) + 1;
    if (lora_grad_cuda_takes(change == 4 ? DType::kFloat64 : DType::kFloat32, layer))
      std::printf("WRONG: change %d is taken\n", change), ++wrong;
  }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
