// matching_loss against a plain double loop. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the
// CUDA source run by the emulator. The argument "quick" selects fewer cases (for the sanitizers).
#include <exception>
#include <list>
#include <stdexcept>
#include <string>

#include "check.h"
#include "kernels/matching_loss.h"
#ifdef R2F_TEST_EMULATED
#include "r2f/cuda.h"
#endif

namespace r2f::test {
namespace {

using Doubles = std::vector<double>;

struct Case {
  int64_t trials;
  std::vector<int64_t> sizes;
};

#ifdef R2F_TEST_EMULATED
constexpr double kImageWeight = 0.5;
constexpr int64_t kWidth = 1100;  // more than a chunk of pixels
constexpr int64_t kMany = 64;     // layers of one launch

// Images of one row: 0, 1, 0, 1, ... The total variation of each is 1.
struct Stripes {
  Array pixels, gradient;
  MatchingImages images;
  Stripes(DType dtype, int64_t trials, std::mt19937& random)
      : pixels(dtype, trials * kWidth, random),
        gradient(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, trials * kWidth, random, false) {
    for (int64_t p = 0; p < trials * kWidth; ++p) pixels.set(p, static_cast<double>(p % kWidth % 2));
    images = {dtype, {pixels.data(), trials, 1, 1, kWidth, false}, kImageWeight, gradient.data()};
  }
  int check(const Doubles& grads) {
    Doubles want;
    for (double grad : grads)
      for (int64_t p = 0; p < kWidth; ++p) {
        const double neighbors = p == 0 || p + 1 == kWidth ? 1 : 2, sign = p % 2 == 0 ? -1 : 1;
        want.push_back(sign * neighbors * kImageWeight * grad / static_cast<double>(kWidth - 1));
      }
    const DType accumulation = images.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    return compare("gradient of the images", gradient, accumulation, want);
  }
};

// Computes the sums and gradients of the layers in two parts if there are many, as factored_matching_loss does.
void run(DType dtype, const MatchingArgs& args, const Doubles& grads, std::vector<MatchingSums>& sums, Doubles& losses,
         const MatchingImages& images) {
  std::mt19937 random;
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t half = args.count > kMany ? args.count / 3 : args.count;
  Array workspace(DType::kFloat64, matching_cuda_workspace(args, images) / 8, random, false);
  Array narrow_losses(accumulation, args.trials, random, false);
  Array narrow_grads(accumulation, 2 * args.trials, random, false);  // of which every second element is read
  for (int64_t t = 0; t < args.trials; ++t) narrow_grads.set(2 * t, grads[static_cast<size_t>(t)]);
  void* memory = workspace.data();
  const auto check = [](const char* error) {
    if (error != nullptr) throw std::runtime_error(error);
  };
  check(matching_chunk_sums_cuda(dtype, args, 0, half, images, memory, nullptr));
  if (half < args.count) check(matching_chunk_sums_cuda(dtype, args, half, args.count, images, memory, nullptr));
  check(matching_losses_cuda(dtype, args, images, memory, sums.data(), {narrow_losses.data(), 1}, nullptr));
  check(matching_gradients_cuda(dtype, args, 0, half, images, sums.data(), {narrow_grads.data(), 2}, memory, nullptr));
  if (half < args.count)
    check(matching_gradients_cuda(dtype, args, half, args.count, images, sums.data(), {narrow_grads.data(), 2}, memory,
                                  nullptr));
  for (int64_t t = 0; t < args.trials; ++t) losses[static_cast<size_t>(t)] = narrow_losses.get(t) - kImageWeight;
}
#else
void run(DType dtype, const MatchingArgs& args, const Doubles& grads, std::vector<MatchingSums>& sums,
         Doubles& losses) {
  const int64_t chunks = matching_chunks(args), half = chunks / 2;  // in two parts, as two threads would
  std::vector<MatchingSums> chunk_sums(static_cast<size_t>(chunks * args.trials));
  matching_chunk_sums_cpu(dtype, args, false, half, chunks, chunk_sums.data());
  matching_chunk_sums_cpu(dtype, args, false, 0, half, chunk_sums.data());
  matching_layer_sums_cpu(args, chunk_sums.data(), sums.data());
  matching_losses(args.kind, args.weights, args.count, args.trials, sums.data(), losses.data());
  std::vector<MatchingCoefficients> factors(static_cast<size_t>(args.count * args.trials));
  matching_coefficients(args.kind, args.weights, args.count, args.trials, sums.data(), grads.data(), factors.data());
  matching_loss_backward_cpu(dtype, args, factors.data(), half, chunks);
  matching_loss_backward_cpu(dtype, args, factors.data(), 0, half);
}
#endif

struct Layer {
  Array candidate, observed, grad_candidate;
};

struct Expected {
  Doubles losses;
  std::vector<Doubles> grad_candidate;
};

Expected by_definition(const std::list<Layer>& layers, const Case& c, const Doubles& weights, MatchingKind kind,
                       bool shared, const Doubles& grads) {
  Expected want;
  std::vector<MatchingSums> sums;
  for (const Layer& layer : layers) want.grad_candidate.emplace_back(layer.candidate.values.size());
  for (int64_t t = 0; t < c.trials; ++t) {
    std::vector<MatchingSums> of;
    MatchingSums total;
    double loss = 0;
    size_t l = 0;
    for (const Layer& layer : layers) {
      MatchingSums s;
      for (int64_t i = 0; i < c.sizes[l]; ++i) {
        const double x = layer.candidate.values[static_cast<size_t>(t * c.sizes[l] + i)];
        const double y = layer.observed.values[static_cast<size_t>((shared ? 0 : t * c.sizes[l]) + i)];
        s.inner += x * y, s.candidate += x * x, s.observed += y * y, s.difference += (x - y) * (x - y);
      }
      of.push_back(s), total.add(weights[l], s);
      const double norms = std::sqrt(s.candidate * s.observed);
      if (kind == MatchingKind::kL2) loss += weights[l] * s.difference;
      if (kind == MatchingKind::kLayerCosine) loss += weights[l] * (1 - (norms > 0 ? s.inner / norms : 0));
      ++l;
    }
    const double norms = std::sqrt(total.candidate * total.observed);
    if (kind == MatchingKind::kCosine) loss = 1 - (norms > 0 ? total.inner / norms : 0);
    want.losses.push_back(loss);
    l = 0;
    for (const Layer& layer : layers) {
      const MatchingSums& s = kind == MatchingKind::kCosine ? total : of[l];
      const double product = std::sqrt(s.candidate * s.observed);
      for (int64_t i = 0; i < c.sizes[l]; ++i) {
        const size_t own = static_cast<size_t>(t * c.sizes[l] + i);
        const size_t theirs = shared ? static_cast<size_t>(i) : own;
        const double x = layer.candidate.values[own], y = layer.observed.values[theirs];
        const double factor = grads[static_cast<size_t>(t)] * weights[l];
        double& gradient = want.grad_candidate[l][own];
        if (kind == MatchingKind::kL2) gradient = 2 * factor * (x - y);
        if (kind != MatchingKind::kL2 && product > 0) gradient = factor / product * (s.inner / s.candidate * x - y);
      }
      ++l;
    }
  }
  return want;
}

#ifndef R2F_TEST_EMULATED
// Checks the pass that computes sums and gradients together: the sums equal those without gradients, and layers that
// allow one pass get the gradients for loss gradients of 1.
int check_one_pass(DType dtype, const MatchingArgs& args, std::list<Layer>& layers, const Expected& want) {
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t chunks = matching_chunks(args), half = chunks / 2;
  std::vector<MatchingSums> alone(static_cast<size_t>(chunks * args.trials)), both(alone.size());
  matching_chunk_sums_cpu(dtype, args, false, 0, chunks, alone.data());
  for (Layer& layer : layers)
    for (size_t i = 0; i < layer.grad_candidate.values.size(); ++i)
      layer.grad_candidate.set(static_cast<int64_t>(i), NAN);
  matching_chunk_sums_cpu(dtype, args, true, half, chunks, both.data());
  matching_chunk_sums_cpu(dtype, args, true, 0, half, both.data());
  int wrong = 0;
  for (size_t i = 0; i < alone.size(); ++i)
    if (alone[i].inner != both[i].inner || alone[i].candidate != both[i].candidate ||
        alone[i].observed != both[i].observed || alone[i].difference != both[i].difference)
      std::printf("WRONG sums of chunk and trial %zu\n", i), ++wrong;
  size_t l = 0;
  for (Layer& layer : layers) {
    if (matching_in_one_pass(args.kind, args.layers[l]))
      wrong += compare("grad_candidate, one pass", layer.grad_candidate, accumulation, want.grad_candidate[l]);
    ++l;
  }
  return wrong;
}
#endif

int check(DType dtype, const Case& c, MatchingKind kind, bool shared, [[maybe_unused]] DType images) {
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  std::mt19937 random(static_cast<unsigned>(c.trials + 10 * static_cast<int64_t>(c.sizes.size()) + c.sizes[0]));
  std::list<Layer> layers;
  std::vector<MatchingLayer> described;
  Doubles weights, grads, losses(static_cast<size_t>(c.trials), NAN);
  for (size_t l = 0; l < c.sizes.size(); ++l) {
    const int64_t size = c.sizes[l], theirs = shared ? size : c.trials * size;
    layers.push_back({Array(dtype, c.trials * size, random), Array(dtype, theirs, random),
                      Array(accumulation, c.trials * size, random, false)});
    Layer& layer = layers.back();
    described.push_back({layer.candidate.data(), layer.observed.data(), shared, size, layer.grad_candidate.data()});
    weights.push_back(static_cast<double>(l % 3 + 1) / static_cast<double>(2 * c.sizes.size()));
  }
  for (int64_t t = 0; t < c.trials; ++t) grads.push_back(0.5 - static_cast<double>(t));
  const MatchingArgs args{described.data(), weights.data(), static_cast<int64_t>(c.sizes.size()), c.trials, kind};
  std::vector<MatchingSums> sums(c.sizes.size() * static_cast<size_t>(c.trials));
  const Expected want = by_definition(layers, c, weights, kind, shared, grads);

  int wrong = 0;
  try {
#ifdef R2F_TEST_EMULATED
    Stripes stripes(images, c.trials, random);
    const int before = emu::launches;
    run(dtype, args, grads, sums, losses, stripes.images);
    wrong += stripes.check(grads);
    const int launches = emu::launches - before, most = images == dtype ? 3 : 5;
    if (args.count <= kMany && launches > most)
      std::printf("WRONG %d launches for the losses and their gradients, expected at most %d\n", launches, most),
          ++wrong;
#else
    run(dtype, args, grads, sums, losses);
#endif
    for (size_t t = 0; t < losses.size(); ++t)
      if (!(std::fabs(losses[t] - want.losses[t]) <=
            (dtype == DType::kFloat64 ? 1e-12 : 2e-5) * std::fmax(1, std::fabs(want.losses[t])))) {
        std::printf("WRONG loss [%zu]: %.9g, expected %.9g\n", t, losses[t], want.losses[t]);
        ++wrong;
      }
    size_t l = 0;
    for (Layer& layer : layers) {
      wrong += compare("grad_candidate", layer.grad_candidate, accumulation, want.grad_candidate[l]);
      ++l;
    }
#ifndef R2F_TEST_EMULATED
    const Expected of_ones = by_definition(layers, c, weights, kind, shared, Doubles(grads.size(), 1.0));
    wrong += check_one_pass(dtype, args, layers, of_ones);
#endif
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s T=%lld layers=%zu first=%lld kind=%d shared=%d images %s\n", name_of(dtype),
                static_cast<long long>(c.trials), c.sizes.size(), static_cast<long long>(c.sizes[0]),
                static_cast<int>(kind), shared, name_of(images));
  return wrong;
}

std::vector<Case> cases(bool quick) {
  std::vector<Case> all = {{1, {1}},    {2, {1, 2, 3, 16, 17}}, {3, {33, 0, 64, 1023}}, {1, {0}}, {2, {2049, 7, 5}},
                           {0, {5, 6}}, {1, {1025, 4}}};
  if (!quick) all.push_back({2, {kMatchingChunk + 1, 8}}), all.push_back({1, {2 * kMatchingChunk, kMatchingChunk - 1}});
#ifndef R2F_TEST_EMULATED
  if (!quick) all.push_back({2, {(1 << 20) + 1}});  // non-temporal stores, with one row that is not aligned
#endif
  Case many{2, {}};  // more than one table of layers and, unless quick, of weights
  for (int64_t l = 0; l < (quick ? 70 : 260); ++l) many.sizes.push_back(l % 7 + 1);
  all.push_back(many);
  all.push_back({2, std::vector<int64_t>(48, 5)});  // a model of usual depth
  all.push_back({35, {3}});                         // more trials than a block holds the coefficients of
  return all;
}

int all(bool quick) {
  int wrong = 0, count = 0;
  for (const Case& c : cases(quick))
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16})
      for (MatchingKind kind : {MatchingKind::kLayerCosine, MatchingKind::kCosine, MatchingKind::kL2})
        for (bool shared : {false, true}) {  // images of the gradients' dtype and, in most cases, of another
          const DType other = kind == MatchingKind::kCosine ? DType::kFloat32 : DType::kFloat64;
          wrong += check(dtype, c, kind, shared, shared ? dtype : other), ++count;
        }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
