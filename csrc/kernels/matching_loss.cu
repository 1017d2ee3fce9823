// Distances between lists of gradients plus the total variation of images on CUDA. See matching_loss.h for the
// interface.
//
//   chunk_sums    a block per chunk of a trial's pixels, or of a layer and trial: writes four sums to the workspace
//   trial_losses  a block per trial: adds up the chunks of each layer and of the images, and computes the loss
//   gradients     a block per chunk of a trial's pixels, or of a layer: all trials' gradients in one pass
//
// The three launches process all layers and the images, because for small models the launches take most of the time.
// Layers are described by tables passed by value as kernel parameters; longer lists take several launches. A kernel is
// compiled for one element type: images of another type than the gradients' take a launch without layers. Each sum is
// computed in a fixed order: results are deterministic.
#include <type_traits>

#include "kernels/matching_loss.h"
#include "kernels/matching_loss_variation.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kTable = 64;   // layers of one launch
constexpr int kTerms = 256;  // layers whose terms fit into a parameter
constexpr int kLossWarps = 16;
constexpr int kTrials = 32;  // trials whose coefficients a block holds

template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
// Blocks on a multiprocessor, which bound the registers of a thread: no more than the code for layers needs alone, so
// that the code for images does not slow it down.
template <typename T>
constexpr int kSumBlocks = std::is_same_v<T, float> ? 8 : 5;
template <typename T>
constexpr int kGradientBlocks = sizeof(T) == 8 ? 4 : 6;

struct Entry {
  const void *candidate, *observed;
  void* grad_candidate;
  int64_t size, first_chunk;  // first_chunk: counted from the table's first chunk
  bool observed_is_shared, aligned;
};

// What one launch processes: first the images' items, then chunks of layers.
struct Table {
  Entry entries[kTable];
  int64_t trials, first_layer, first_chunk, count, chunks;  // of the layers: the first one and its first chunk
  Variation variation;
  // The layer of a chunk.
  R2F_HOST_DEVICE int find(int64_t chunk) const {
    int layer = 0;
    while (layer + 1 < count && entries[layer + 1].first_chunk <= chunk) ++layer;
    return layer;
  }
};

// A layer's term of the losses.
struct Term {
  double weight;
  int64_t last_chunk;  // the number of chunks up to this layer
};

// The terms of all layers: a kernel parameter, or in device memory if they are more than a parameter holds.
struct Terms {
  Term parameter[kTerms];
  const Term* memory;  // null if they are in the parameter
  int64_t layers, trials;
  MatchingKind kind;

  __device__ __forceinline__ Term operator[](int64_t l) const { return memory == nullptr ? parameter[l] : memory[l]; }
};
static_assert(sizeof(Table) + sizeof(Terms) <= 32000, "the kernel parameters of CUDA 12.1 and newer");

// The trials' losses or their gradients, read and written as float64. The type is not that of the kernel, which may be
// the images' alone.
struct Numbers {
  TrialNumbers of;
  bool wide;

  __device__ __forceinline__ double get(int64_t t) const {
    if (of.data == nullptr) return 1;
    return wide ? static_cast<const double*>(of.data)[t * of.stride]
                : static_cast<const float*>(of.data)[t * of.stride];
  }
  __device__ __forceinline__ void set(int64_t t, double value) const {
    if (wide)
      static_cast<double*>(of.data)[t * of.stride] = value;
    else
      static_cast<float*>(of.data)[t * of.stride] = static_cast<float>(value);
  }
};

// float32 gradients are multiplied by this power of two (exact) before they are squared, so that gradients from 1e-28
// to 1e9 neither underflow nor overflow; the sums are divided by its square in float64.
template <typename T>
constexpr Accumulation<T> kUnit = sizeof(T) == 8 ? Accumulation<T>(1) : Accumulation<T>(4294967296.0);

__global__ void copy_terms(const __grid_constant__ Terms from, int count, Term* to) {
  const int l = static_cast<int>(threadIdx.x);
  if (l < count) to[l] = from.parameter[l];
}

struct BlockSums {
  MatchingSums of_warp[kWarps];
};

__device__ __forceinline__ MatchingSums warp_total(const MatchingSums& s) {
  return {warp_sum(s.inner), warp_sum(s.candidate), warp_sum(s.observed), warp_sum(s.difference)};
}

// The sum over the block, in thread 0.
__device__ __forceinline__ MatchingSums block_total(const MatchingSums& mine, BlockSums& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const MatchingSums sum = warp_total(mine);
  __syncthreads();  // the previous sums have been read by all threads
  if (lane == 0) shared.of_warp[warp] = sum;
#ifndef R2F_PLANTED_BUG  // the tests remove this barrier and must fail
  __syncthreads();
#endif
  MatchingSums total;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) total.add(1, shared.of_warp[w]);
  return total;
}

// The thread's part of the sums of a chunk of a layer and trial. `item`: counted from the table's first chunk.
template <typename T>
__device__ __forceinline__ MatchingSums layer_sums(const Table& table, int64_t item) {
  using Acc = Accumulation<T>;
  constexpr int kVec = kPack<T>;
  const int64_t chunk = item / table.trials, t = item % table.trials;
  const Entry& layer = table.entries[table.find(chunk)];
  const int64_t begin = (chunk - layer.first_chunk) * kMatchingChunk;
  const int64_t left = layer.size - begin;
  const int size = static_cast<int>(left < kMatchingChunk ? left : kMatchingChunk);
  const T* c = static_cast<const T*>(layer.candidate) + t * layer.size + begin;
  const T* o = static_cast<const T*>(layer.observed) + (layer.observed_is_shared ? 0 : t * layer.size) + begin;
  Acc inner = 0, candidate = 0, observed = 0, difference = 0;
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < size; i += kThreads * kVec) {
    const bool whole = layer.aligned && i + kVec <= size;
    const auto x = load_pack<T, kVec>(c + i, size - i, whole), y = load_pack<T, kVec>(o + i, size - i, whole);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const Acc a = widen(x.element[k]) * kUnit<T>, b = widen(y.element[k]) * kUnit<T>, d = a - b;
      inner += a * b, candidate += a * a, observed += b * b, difference += d * d;
    }
  }
  const double by_unit = 1.0 / (static_cast<double>(kUnit<T>) * static_cast<double>(kUnit<T>));
  return {inner * by_unit, candidate * by_unit, observed * by_unit, difference * by_unit};
}

// `sums` of the table's items. The total variation of pixels is stored as a `difference`.
template <typename T>
__global__ void __launch_bounds__(kThreads, kSumBlocks<T>)
    chunk_sums(const __grid_constant__ Table table, MatchingSums* sums) {
  R2F_DYNAMIC_SHARED(BlockSums, shared);
  const int64_t of_images = table.variation.items;
  for (int64_t item = blockIdx.x; item < of_images + table.chunks * table.trials; item += gridDim.x) {
    MatchingSums mine;
    if (item < of_images)
      mine.difference = variation_sum<T>(table.variation, item);
    else
      mine = layer_sums<T>(table, item - of_images);
    const MatchingSums total = block_total(mine, shared);
    if (threadIdx.x == 0) sums[item] = total;
  }
}

// The weighted sums of a trial's layers, in every lane of the warp.
__device__ __forceinline__ MatchingSums trial_total(const Terms& terms, const MatchingSums* sums, int64_t t) {
  MatchingSums mine;
  for (int64_t l = threadIdx.x % kWarpSize; l < terms.layers; l += kWarpSize)
    mine.add(terms[l].weight, sums[l * terms.trials + t]);
  return warp_total(mine);
}

// image_sums [trials, image_chunks], chunk_sums [chunks, trials]
__global__ void __launch_bounds__(kLossWarps* kWarpSize, 1)
    trial_losses(const __grid_constant__ Terms terms, const MatchingSums* image_sums, int64_t image_chunks,
                 double image_weight, const MatchingSums* chunk_sums, MatchingSums* sums, Numbers losses) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int64_t t = blockIdx.x; t < terms.trials; t += gridDim.x) {
    for (int64_t l = warp; l < terms.layers; l += kLossWarps) {
      MatchingSums mine;
      for (int64_t chunk = (l == 0 ? 0 : terms[l - 1].last_chunk) + lane; chunk < terms[l].last_chunk;
           chunk += kWarpSize)
        mine.add(1, chunk_sums[chunk * terms.trials + t]);
      const MatchingSums total = warp_total(mine);
      if (lane == 0) sums[l * terms.trials + t] = total;
    }
    __syncthreads();
    if (warp > 0) continue;
    double distance = 0;
    for (int64_t l = lane; l < terms.layers; l += kWarpSize)
      distance += layer_distance(terms.kind, terms[l].weight, sums[l * terms.trials + t]);
    for (int64_t chunk = lane; chunk < image_chunks; chunk += kWarpSize)
      distance += image_weight * image_sums[t * image_chunks + chunk].difference;
    distance = warp_sum(distance);
    if (terms.kind == MatchingKind::kCosine) distance += 1 - cosine(trial_total(terms, sums, t));
    if (lane == 0) losses.set(t, distance);
  }
}

// The coefficients of some trials for one layer.
struct Coefficients {
  MatchingCoefficients of_trial[kTrials];
};

__device__ __forceinline__ void compute_coefficients(const Terms& terms, int64_t l, const MatchingSums* sums,
                                                     const Numbers& grads, int64_t first, int64_t last,
                                                     Coefficients& out) {
  for (int64_t t = first + threadIdx.x / kWarpSize; t < last; t += kWarps) {
    const MatchingSums total = terms.kind == MatchingKind::kCosine ? trial_total(terms, sums, t) : MatchingSums{};
    if (threadIdx.x % kWarpSize == 0)
      out.of_trial[t - first] =
          matching_coefficients(terms.kind, terms[l].weight, grads.get(t), sums[l * terms.trials + t], total);
  }
}

// p x + q y in float64, so that neither the factors nor the products overflow.
template <typename Acc>
__device__ __forceinline__ Acc combine(double p, Acc x, double q, Acc y) {
  return static_cast<Acc>(p * x + q * y);
}

// The gradients of trials first <= t < last in a chunk of a layer.
template <typename T>
__device__ __forceinline__ void layer_gradients(const Entry& layer, int64_t chunk, int64_t first, int64_t last,
                                                const Coefficients& coefficients) {
  using Acc = Accumulation<T>;
  constexpr int kVec = 16 / static_cast<int>(sizeof(Acc));
  const int64_t begin = (chunk - layer.first_chunk) * kMatchingChunk;
  const int64_t end = begin + kMatchingChunk < layer.size ? begin + kMatchingChunk : layer.size;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kVec; i < end; i += kThreads * kVec) {
    const bool whole = layer.aligned && i + kVec <= end;
    for (int64_t t = first; t < last; ++t) {
      const MatchingCoefficients k = coefficients.of_trial[t - first];
      const int64_t own = t * layer.size + i, theirs = layer.observed_is_shared ? i : own;
      const auto c = load_pack<T, kVec>(static_cast<const T*>(layer.candidate) + own, end - i, whole);
      const auto o = load_pack<T, kVec>(static_cast<const T*>(layer.observed) + theirs, end - i, whole);
      Pack<Acc, kVec> gradient;
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        gradient.element[e] = combine(k.observed, widen(o.element[e]), k.candidate, widen(c.element[e]));
      store_pack(static_cast<Acc*>(layer.grad_candidate) + own, gradient, end - i, whole);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<T>)
    gradients(const __grid_constant__ Table table, const __grid_constant__ Terms terms, const MatchingSums* sums,
              Numbers grads) {
  R2F_DYNAMIC_SHARED(Coefficients, shared);
  const int64_t of_images = table.variation.items;
  for (int64_t item = blockIdx.x; item < of_images + table.chunks; item += gridDim.x) {
    if (item < of_images) {
      variation_gradient<T>(table.variation, item, grads.get(item / table.variation.chunks));
      continue;
    }
    const int l = table.find(item - of_images);
    for (int64_t first = 0; first < table.trials; first += kTrials) {
      const int64_t last = first + kTrials < table.trials ? first + kTrials : table.trials;
      __syncthreads();  // the previous coefficients have been read by all threads
      compute_coefficients(terms, table.first_layer + l, sums, grads, first, last, shared);
      __syncthreads();
      layer_gradients<T>(table.entries[l], item - of_images, first, last, shared);
    }
  }
}

template <typename T>
Entry entry(const MatchingLayer& layer, int64_t trials, int64_t first_chunk) {
  const auto bits = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const uintptr_t all = bits(layer.candidate) | bits(layer.observed) | bits(layer.grad_candidate);
  const bool aligned = all % 16 == 0 && (trials == 1 || layer.size % kPack<T> == 0);
  return {layer.candidate,          layer.observed, layer.grad_candidate, layer.size, first_chunk,
          layer.observed_is_shared, aligned};
}

// Calls work with a value of the type.
template <typename Work>
void with_type(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::kFloat32: return work(float{});
    case DType::kFloat64: return work(double{});
    case DType::kBFloat16: return work(BFloat16{});
  }
}

// Calls work(a value of the table's type, table) for the tables of the layers first <= l < last. The images are in the
// first table of their type.
template <typename Work>
void for_tables(DType dtype, const MatchingArgs& args, int64_t first, int64_t last, const MatchingImages& images,
                const Work& work) {
  Table table{};
  table.trials = args.trials;
  if (first == 0) table.variation = variation_of(images);
  if (images.dtype != dtype) {
    if (table.variation.items > 0) with_type(images.dtype, [&](auto type) { work(type, table); });
    table.variation.items = 0;
  }
  for (int64_t l = 0; l < first; ++l) table.first_chunk += matching_chunks(args.layers[l]);
  with_type(dtype, [&](auto type) {
    for (int64_t l = first; l < last || table.variation.items > 0;) {
      table.first_layer = l, table.count = table.chunks = 0;
      for (; l < last && table.count < kTable; ++l) {
        table.entries[table.count++] = entry<decltype(type)>(args.layers[l], args.trials, table.chunks);
        table.chunks += matching_chunks(args.layers[l]);
      }
      if (table.chunks + table.variation.items > 0) work(type, table);
      table.first_chunk += table.chunks, table.variation.items = 0;
    }
  });
}

// The workspace: the terms [layers], the images' sums [trials, chunks of an image], the layers' sums [chunks, trials].
struct Workspace {
  Term* terms;
  MatchingSums *image_sums, *chunk_sums;
  Workspace(const MatchingArgs& args, const MatchingImages& images, void* memory)
      : terms(static_cast<Term*>(memory)),
        image_sums(reinterpret_cast<MatchingSums*>(terms + args.count)),
        chunk_sums(image_sums + variation_of(images).items) {}
};

// The terms, as a kernel reads them. They are copied to `memory` if they do not fit into a parameter.
Terms send_terms(const MatchingArgs& args, Term* memory, cudaStream_t stream) {
  Terms terms{};
  terms.layers = args.count, terms.trials = args.trials, terms.kind = args.kind;
  if (args.count > kTerms) terms.memory = memory;
  int64_t chunks = 0;
  for (int64_t l = 0; l < args.count; ++l) {
    const int place = static_cast<int>(l % kTerms);
    chunks += matching_chunks(args.layers[l]);
    terms.parameter[place] = {args.weights[l], chunks};
    if (args.count > kTerms && (place + 1 == kTerms || l + 1 == args.count))
      launch(copy_terms, 1, kTerms, 0, stream, terms, place + 1, memory + (l - place));
  }
  return terms;
}

}  // namespace

int64_t matching_cuda_workspace(const MatchingArgs& args, const MatchingImages& images) {
  const int64_t sums = variation_of(images).items + matching_chunks(args) * args.trials;
  return args.count * static_cast<int64_t>(sizeof(Term)) + sums * static_cast<int64_t>(sizeof(MatchingSums));
}

const char* matching_chunk_sums_cuda(DType dtype, const MatchingArgs& args, int64_t first, int64_t last,
                                     const MatchingImages& images, void* workspace, void* stream) {
  if (images.args.channels * images.args.height * images.args.width > INT32_MAX) return "an image of 2^31 pixels or more";
  MatchingSums* sums = Workspace(args, images, workspace).chunk_sums;
  for_tables(dtype, args, first, last, images, [&](auto type, const Table& table) {
    const int64_t of_images = table.variation.items, items = of_images + table.chunks * table.trials;
    if (items > 0)
      launch(chunk_sums<decltype(type)>, grid_for(items), kThreads, sizeof(BlockSums),
             static_cast<cudaStream_t>(stream), table, sums + table.first_chunk * table.trials - of_images);
  });
  return launch_error();
}

const char* matching_losses_cuda(DType dtype, const MatchingArgs& args, const MatchingImages& images, void* workspace,
                                 MatchingSums* sums, TrialNumbers losses, void* stream) {
  if (args.trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  const Workspace memory(args, images, workspace);
  launch(trial_losses, grid_for(args.trials), kLossWarps * kWarpSize, 0, s, send_terms(args, memory.terms, s),
         memory.image_sums, variation_of(images).chunks, images.weight, memory.chunk_sums, sums,
         Numbers{losses, dtype == DType::kFloat64});
  return launch_error();
}

const char* matching_gradients_cuda(DType dtype, const MatchingArgs& args, int64_t first, int64_t last,
                                    const MatchingImages& images, const MatchingSums* sums, TrialNumbers grads,
                                    void* workspace, void* stream) {
  if (args.trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  const Terms terms = send_terms(args, Workspace(args, images, workspace).terms, s);
  for_tables(dtype, args, first, last, images, [&](auto type, const Table& table) {
    launch(gradients<decltype(type)>, grid_for(table.variation.items + table.chunks), kThreads, sizeof(Coefficients), s,
           table, terms, sums, Numbers{grads, dtype == DType::kFloat64});
  });
  return launch_error();
}

}  // namespace r2f
