// Distances between lists of gradients on CUDA. See matching_loss.h for the interface.
//
//   chunk_sums          a block per chunk of a layer and trial: writes four sums to the workspace
//   layer_sums          a block per layer and trial: adds up its chunks
//   trial_losses        a warp per trial: computes the loss from the sums of the trial's layers
//   trial_coefficients  a warp per trial: computes every layer's coefficients from the sums and the loss gradient
//   backward            a block per chunk: computes the gradients of all trials in one pass
//
// Layers are described by tables passed by value as kernel parameters; longer lists take several launches. Each sum is
// computed in a fixed order: results are deterministic.
#include "kernels/matching_loss.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kTable = 64;  // layers of one launch
constexpr int kWeightTable = 256;

template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

struct Entry {
  const void *candidate, *observed;
  void* grad_candidate;
  int64_t size, first_chunk;  // first_chunk: counted from the table's first chunk
  bool observed_is_shared, aligned;
};

struct Table {
  Entry entries[kTable];
  int count;
  int64_t chunks;
  // The layer of a chunk.
  R2F_HOST_DEVICE int find(int64_t chunk) const {
    int layer = 0;
    while (layer + 1 < count && entries[layer + 1].first_chunk <= chunk) ++layer;
    return layer;
  }
};
static_assert(sizeof(Table) <= 4000);

// The layers' weights: a kernel parameter, or in device memory if they are more than a parameter holds.
struct Weights {
  double parameter[kWeightTable];
  const double* memory;  // null if they are in the parameter
  int count;             // of those in the parameter

  __device__ __forceinline__ double operator[](int64_t l) const { return memory == nullptr ? parameter[l] : memory[l]; }
};

// float32 gradients are multiplied by this power of two (exact) before they are squared, so that gradients from 1e-28
// to 1e9 neither underflow nor overflow; the sums are divided by its square in float64.
template <typename T>
constexpr Accumulation<T> kUnit = sizeof(T) == 8 ? Accumulation<T>(1) : Accumulation<T>(4294967296.0);

__global__ void copy_weights(const __grid_constant__ Weights from, double* to) {
  for (int l = static_cast<int>(threadIdx.x); l < from.count; l += kThreads) to[l] = from.parameter[l];
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

template <typename T>
__global__ void __launch_bounds__(kThreads) chunk_sums(Table table, int64_t trials, MatchingSums* partial_sums) {
  using Acc = Accumulation<T>;
  constexpr int kVec = kPack<T>;
  R2F_DYNAMIC_SHARED(BlockSums, shared);
  for (int64_t item = blockIdx.x; item < table.chunks * trials; item += gridDim.x) {
    const int64_t chunk = item / trials, t = item % trials;
    const Entry& layer = table.entries[table.find(chunk)];
    const int64_t begin = (chunk - layer.first_chunk) * kMatchingChunk;
    const int64_t left = layer.size - begin, size = left < kMatchingChunk ? left : kMatchingChunk;
    const T* c = static_cast<const T*>(layer.candidate) + t * layer.size + begin;
    const T* o = static_cast<const T*>(layer.observed) + (layer.observed_is_shared ? 0 : t * layer.size) + begin;
    Acc inner = 0, candidate = 0, observed = 0, difference = 0;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kVec; i < size; i += kThreads * kVec) {
      const bool whole = layer.aligned && i + kVec <= size;
      const auto x = load_pack<T, kVec>(c + i, size - i, whole), y = load_pack<T, kVec>(o + i, size - i, whole);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const Acc a = widen(x.element[k]) * kUnit<T>, b = widen(y.element[k]) * kUnit<T>, d = a - b;
        inner += a * b, candidate += a * a, observed += b * b, difference += d * d;
      }
    }
    const double by_unit = 1.0 / (static_cast<double>(kUnit<T>) * static_cast<double>(kUnit<T>));
    const MatchingSums total =
        block_total({inner * by_unit, candidate * by_unit, observed * by_unit, difference * by_unit}, shared);
    if (threadIdx.x == 0) partial_sums[chunk * trials + t] = total;
  }
}

// partial_sums and sums of the table's layers only.
__global__ void __launch_bounds__(kThreads)
    layer_sums(Table table, int64_t trials, const MatchingSums* partial_sums, MatchingSums* sums) {
  R2F_DYNAMIC_SHARED(BlockSums, shared);
  for (int64_t item = blockIdx.x; item < table.count * trials; item += gridDim.x) {
    const int64_t l = item / trials, t = item % trials;
    const int64_t last = l + 1 < table.count ? table.entries[l + 1].first_chunk : table.chunks;
    MatchingSums mine;
    for (int64_t chunk = table.entries[l].first_chunk + threadIdx.x; chunk < last; chunk += kThreads)
      mine.add(1, partial_sums[chunk * trials + t]);
    const MatchingSums total = block_total(mine, shared);
    if (threadIdx.x == 0) sums[l * trials + t] = total;
  }
}

struct Shape {
  int64_t layers, trials;
  MatchingKind kind;
};

// The weighted sums of a trial's layers, in every lane of the warp.
__device__ __forceinline__ MatchingSums trial_total(const Shape& shape, const Weights& weights,
                                                    const MatchingSums* sums, int64_t t) {
  MatchingSums mine;
  for (int64_t l = threadIdx.x; l < shape.layers; l += kWarpSize) mine.add(weights[l], sums[l * shape.trials + t]);
  return warp_total(mine);
}

template <typename Acc>
__global__ void trial_losses(Shape shape, const __grid_constant__ Weights weights, const MatchingSums* sums,
                             const double* image_losses, double image_weight, Acc* out) {
  for (int64_t t = blockIdx.x; t < shape.trials; t += gridDim.x) {
    double distance = 0;
    for (int64_t l = threadIdx.x; l < shape.layers; l += kWarpSize)
      distance += layer_distance(shape.kind, weights[l], sums[l * shape.trials + t]);
    distance = warp_sum(distance);
    if (shape.kind == MatchingKind::kCosine) distance = 1 - cosine(trial_total(shape, weights, sums, t));
    if (image_losses != nullptr) distance += image_weight * image_losses[t];
    if (threadIdx.x == 0) out[t] = static_cast<Acc>(distance);
  }
}

template <typename Acc>
__global__ void trial_coefficients(Shape shape, const __grid_constant__ Weights weights, const MatchingSums* sums,
                                   const Acc* grads, MatchingCoefficients* out) {
  for (int64_t t = blockIdx.x; t < shape.trials; t += gridDim.x) {
    const MatchingSums total = trial_total(shape, weights, sums, t);
    for (int64_t l = threadIdx.x; l < shape.layers; l += kWarpSize)
      out[l * shape.trials + t] =
          matching_coefficients(shape.kind, weights[l], grads[t], sums[l * shape.trials + t], total);
  }
}

// p x + q y in float64, so that neither the factors nor the products overflow.
template <typename Acc>
__device__ __forceinline__ Acc combine(double p, Acc x, double q, Acc y) {
  return static_cast<Acc>(p * x + q * y);
}

// Coefficients of the table's layers only.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward(Table table, int64_t trials, const MatchingCoefficients* factors) {
  using Acc = Accumulation<T>;
  constexpr int kVec = 16 / static_cast<int>(sizeof(Acc));
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const int l = table.find(chunk);
    const Entry& layer = table.entries[l];
    const int64_t begin = (chunk - layer.first_chunk) * kMatchingChunk;
    const int64_t end = begin + kMatchingChunk < layer.size ? begin + kMatchingChunk : layer.size;
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kVec; i < end; i += kThreads * kVec) {
      const bool whole = layer.aligned && i + kVec <= end;
      for (int64_t t = 0; t < trials; ++t) {
        const MatchingCoefficients k = factors[l * trials + t];
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
}

template <typename T>
Entry entry(const MatchingLayer& layer, int64_t trials, int64_t first_chunk) {
  const auto bits = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const uintptr_t all = bits(layer.candidate) | bits(layer.observed) | bits(layer.grad_candidate);
  const bool aligned = all % 16 == 0 && (trials == 1 || layer.size % kPack<T> == 0);
  return {layer.candidate,          layer.observed, layer.grad_candidate, layer.size, first_chunk,
          layer.observed_is_shared, aligned};
}

// Calls work(table, its first layer, its first chunk) for each table in turn.
template <typename T, typename Work>
void for_tables(const MatchingArgs& args, const Work& work) {
  int64_t chunks = 0;
  for (int64_t first = 0; first < args.count; first += kTable) {
    Table table{};
    table.count = static_cast<int>(args.count - first < kTable ? args.count - first : kTable);
    for (int l = 0; l < table.count; ++l) {
      table.entries[l] = entry<T>(args.layers[first + l], args.trials, table.chunks);
      table.chunks += matching_chunks(args.layers[first + l]);
    }
    work(table, first, chunks);
    chunks += table.chunks;
  }
}

// The workspace: weights [layers], then the chunks' sums [chunks, trials], or the coefficients [layers, trials].
struct Workspace {
  double* weights;
  double* rest;
  Workspace(const MatchingArgs& args, void* memory)
      : weights(static_cast<double*>(memory)), rest(weights + args.count) {}
};

// The first ones of `count` weights on the host, as many as a parameter holds.
Weights first_weights(const double* weights, int64_t count) {
  Weights result{};
  result.count = static_cast<int>(count < kWeightTable ? count : kWeightTable);
  for (int l = 0; l < result.count; ++l) result.parameter[l] = weights[l];
  return result;
}

// All weights, as a kernel reads them. They are copied to `memory` if they do not fit into a parameter.
Weights send_weights(const double* weights, int64_t count, double* memory, cudaStream_t stream) {
  if (count <= kWeightTable) return first_weights(weights, count);
  for (int64_t first = 0; first < count; first += kWeightTable)
    launch(copy_weights, 1, kThreads, 0, stream, first_weights(weights + first, count - first), memory + first);
  Weights result{};
  result.memory = memory;
  return result;
}

template <typename T>
void forward(const MatchingArgs& args, MatchingSums* sums, MatchingSums* partial_sums, cudaStream_t stream) {
  const int64_t trials = args.trials;
  for_tables<T>(args, [&](const Table& table, int64_t first, int64_t chunk) {
    const unsigned chunks = grid_for(table.chunks * trials), layers = grid_for(table.count * trials);
    MatchingSums* table_sums = partial_sums + chunk * trials;
    if (chunks > 0) launch(chunk_sums<T>, chunks, kThreads, sizeof(BlockSums), stream, table, trials, table_sums);
    launch(layer_sums, layers, kThreads, sizeof(BlockSums), stream, table, trials, table_sums, sums + first * trials);
  });
}

template <typename T>
void gradients(const MatchingArgs& args, const MatchingCoefficients* factors, cudaStream_t stream) {
  for_tables<T>(args, [&](const Table& table, int64_t first, int64_t) {
    if (table.chunks > 0)
      launch(backward<T>, grid_for(table.chunks), kThreads, 0, stream, table, args.trials,
             factors + first * args.trials);
  });
}

}  // namespace

int64_t matching_loss_cuda_workspace(const MatchingArgs& args) {
  const int64_t chunks = matching_chunks(args) * static_cast<int64_t>(sizeof(MatchingSums));
  const int64_t factors = args.count * static_cast<int64_t>(sizeof(MatchingCoefficients));
  return args.count * static_cast<int64_t>(sizeof(double)) + args.trials * (chunks > factors ? chunks : factors);
}

const char* matching_losses_cuda(DType dtype, MatchingKind kind, const double* weights, int64_t layers, int64_t trials,
                                 const MatchingSums* sums, const double* image_losses, double image_weight,
                                 void* losses, double* workspace, void* stream) {
  if (trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  const Shape shape{layers, trials, kind};
  const Weights on_device = send_weights(weights, layers, workspace, s);
  if (dtype == DType::kFloat64)
    launch(trial_losses<double>, grid_for(trials), kWarpSize, 0, s, shape, on_device, sums, image_losses, image_weight,
           static_cast<double*>(losses));
  else
    launch(trial_losses<float>, grid_for(trials), kWarpSize, 0, s, shape, on_device, sums, image_losses, image_weight,
           static_cast<float*>(losses));
  return launch_error();
}

const char* matching_coefficients_cuda(DType dtype, MatchingKind kind, const double* weights, int64_t layers,
                                       int64_t trials, const MatchingSums* sums, const void* grads,
                                       MatchingCoefficients* coefficients, double* workspace, void* stream) {
  if (trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  const Shape shape{layers, trials, kind};
  const Weights on_device = send_weights(weights, layers, workspace, s);
  if (dtype == DType::kFloat64)
    launch(trial_coefficients<double>, grid_for(trials), kWarpSize, 0, s, shape, on_device, sums,
           static_cast<const double*>(grads), coefficients);
  else
    launch(trial_coefficients<float>, grid_for(trials), kWarpSize, 0, s, shape, on_device, sums,
           static_cast<const float*>(grads), coefficients);
  return launch_error();
}

const char* matching_sums_cuda(DType dtype, const MatchingArgs& args, MatchingSums* sums, void* workspace,
                               void* stream) {
  if (args.trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  MatchingSums* partial_sums = reinterpret_cast<MatchingSums*>(Workspace(args, workspace).rest);
  switch (dtype) {
    case DType::kFloat32: forward<float>(args, sums, partial_sums, s); break;
    case DType::kFloat64: forward<double>(args, sums, partial_sums, s); break;
    case DType::kBFloat16: forward<BFloat16>(args, sums, partial_sums, s); break;
  }
  return launch_error();
}

const char* matching_gradients_cuda(DType dtype, const MatchingArgs& args, const MatchingCoefficients* coefficients,
                                    void* stream) {
  if (args.trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: gradients<float>(args, coefficients, s); break;
    case DType::kFloat64: gradients<double>(args, coefficients, s); break;
    case DType::kBFloat16: gradients<BFloat16>(args, coefficients, s); break;
  }
  return launch_error();
}

const char* matching_loss_cuda(DType dtype, const MatchingArgs& args, const double* image_losses, double image_weight,
                               MatchingSums* sums, void* losses, void* workspace, void* stream) {
  const char* error = matching_sums_cuda(dtype, args, sums, workspace, stream);
  if (error != nullptr) return error;
  return matching_losses_cuda(dtype, args.kind, args.weights, args.count, args.trials, sums, image_losses, image_weight,
                              losses, Workspace(args, workspace).weights, stream);
}

const char* matching_loss_backward_cuda(DType dtype, const MatchingArgs& args, const void* grads,
                                        const MatchingSums* sums, void* workspace, void* stream) {
  const Workspace memory(args, workspace);
  MatchingCoefficients* coefficients = reinterpret_cast<MatchingCoefficients*>(memory.rest);
  const char* error = matching_coefficients_cuda(dtype, args.kind, args.weights, args.count, args.trials, sums, grads,
                                                 coefficients, memory.weights, stream);
  return error != nullptr ? error : matching_gradients_cuda(dtype, args, coefficients, stream);
}

}  // namespace r2f
