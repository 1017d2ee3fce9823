// Distances of factored gradients on CUDA. See factored_matching_loss.h for what is computed. Gram matrices and
// products come from the library, one layer at a time; here are the sums over their elements and the factors of the
// gradients.
//
//   piece_products  one block takes a run of one pair's elements for one trial
//   trial_sums      one warp takes a trial: adds up the pieces of its three pairs
//   scale           one thread takes some elements
//
// Each sum is taken in one fixed order: results are deterministic.
#include "kernels/factored_matching_loss.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kPairs = 3;
constexpr int64_t kPiece = 8192;

template <typename Acc>
constexpr int kPack = 16 / static_cast<int>(sizeof(Acc));  // elements of one wide load

struct Pairs {
  FactoredPair pair[kPairs];
  int64_t first_piece[kPairs + 1];  // counted over the pairs
};

struct BlockSum {
  double of_warp[kWarps];
};

template <typename Acc>
__global__ void __launch_bounds__(kThreads) piece_products(Pairs pairs, int64_t trials, double* of_pieces) {
  constexpr int kVec = kPack<Acc>;
  R2F_DYNAMIC_SHARED(BlockSum, shared);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < pairs.first_piece[kPairs] * trials; item += gridDim.x) {
    const int64_t piece = item / trials, t = item % trials;
    const int which = piece < pairs.first_piece[1] ? 0 : piece < pairs.first_piece[2] ? 1 : 2;
    const FactoredPair& pair = pairs.pair[which];
    const int64_t begin = (piece - pairs.first_piece[which]) * kPiece;
    const int64_t end = begin + kPiece < pair.size ? begin + kPiece : pair.size;
    const int64_t offset = pair.shared ? 0 : t * pair.size;
    const Acc *a = static_cast<const Acc*>(pair.a) + offset, *b = static_cast<const Acc*>(pair.b) + offset;
    const bool aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
    double sum = 0;
    for (int64_t i = begin + thread * kVec; i < end; i += kThreads * kVec) {
      const bool whole = aligned && i + kVec <= end;
      const auto x = load_pack<Acc, kVec>(a + i, end - i, whole), y = load_pack<Acc, kVec>(b + i, end - i, whole);
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum += static_cast<double>(x.element[e]) * static_cast<double>(y.element[e]);
    }
    sum = warp_sum(sum);
    __syncthreads();  // all have read the block's last sums
    if (thread % kWarpSize == 0) shared.of_warp[thread / kWarpSize] = sum;
#ifndef R2F_PLANTED_BUG  // the tests leave this barrier out and must notice
    __syncthreads();
#endif
    if (thread == 0) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += shared.of_warp[w];
      of_pieces[item] = pair.factor * total;
    }
  }
}

__global__ void trial_sums(Pairs pairs, int64_t trials, const double* of_pieces, MatchingSums* sums) {
  for (int64_t t = blockIdx.x; t < trials; t += gridDim.x) {
    double total[kPairs];
#pragma unroll
    for (int which = 0; which < kPairs; ++which) {
      double mine = 0;
      for (int64_t piece = pairs.first_piece[which] + threadIdx.x; piece < pairs.first_piece[which + 1];
           piece += kWarpSize)
        mine += of_pieces[piece * trials + t];
      total[which] = warp_sum(mine);
    }
    if (threadIdx.x == 0) sums[t] = factored_sums(total[1], total[0], total[2] < 0 ? 0 : total[2]);
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    scale(const Acc* in, Acc* out, int64_t size, int64_t trials, const MatchingCoefficients* coefficients,
          bool observed, double factor) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size * trials; i += step) {
    const MatchingCoefficients& k = coefficients[i / size];
    out[i] = static_cast<Acc>((observed ? k.observed : k.candidate) * factor * in[i]);
  }
}

Pairs pairs_of(const FactoredPair* given) {
  Pairs pairs{};
  for (int which = 0; which < kPairs; ++which) {
    pairs.pair[which] = given[which];
    pairs.first_piece[which + 1] = pairs.first_piece[which] + (given[which].size + kPiece - 1) / kPiece;
  }
  return pairs;
}

template <typename Acc>
void run_sums(const FactoredPair* given, int64_t trials, MatchingSums* sums, double* workspace, cudaStream_t stream) {
  const Pairs pairs = pairs_of(given);
  const int64_t items = pairs.first_piece[kPairs] * trials;
  if (items > 0)
    launch(piece_products<Acc>, grid_for(items), kThreads, sizeof(BlockSum), stream, pairs, trials, workspace);
  launch(trial_sums, grid_for(trials), kWarpSize, 0, stream, pairs, trials, workspace, sums);
}

template <typename Acc>
void run_scale(const void* in, void* out, int64_t size, int64_t trials, const MatchingCoefficients* coefficients,
               bool observed, double factor, cudaStream_t stream) {
  launch(scale<Acc>, grid_for((size * trials + kThreads - 1) / kThreads), kThreads, 0, stream,
         static_cast<const Acc*>(in), static_cast<Acc*>(out), size, trials, coefficients, observed, factor);
}

}  // namespace

int64_t factored_sums_cuda_workspace(const FactoredPair* pairs, int64_t trials) {
  return pairs_of(pairs).first_piece[kPairs] * trials;
}

const char* factored_sums_cuda(DType dtype, const FactoredPair* pairs, int64_t trials, MatchingSums* sums,
                               double* workspace, void* stream) {
  if (trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  dtype == DType::kFloat64 ? run_sums<double>(pairs, trials, sums, workspace, s)
                           : run_sums<float>(pairs, trials, sums, workspace, s);
  return launch_error();
}

const char* factored_scale_cuda(DType dtype, const void* in, void* out, int64_t size, int64_t trials,
                                const MatchingCoefficients* coefficients, bool observed, double factor, void* stream) {
  if (size * trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  dtype == DType::kFloat64 ? run_scale<double>(in, out, size, trials, coefficients, observed, factor, s)
                           : run_scale<float>(in, out, size, trials, coefficients, observed, factor, s);
  return launch_error();
}

}  // namespace r2f
