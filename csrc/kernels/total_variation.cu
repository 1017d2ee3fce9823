// Total variation on CUDA. See total_variation.h for the formulas.
//
//   chunk_values    a block per chunk of a trial's pixels: sums the differences to the right and to the row below
//   trial_values    a block per trial: adds up its chunks
//   gradient        a thread per pixel: gathers the derivatives of the differences that the pixel is part of
//
// Sums have a fixed order: results are deterministic.
#include "kernels/total_variation.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int64_t kChunk = 4096;  // pixels of a block

struct Shape {
  int64_t trials, pixels, height, width;  // pixels: of a trial
  TotalVariationUnits unit;
};

Shape shape_of(const TotalVariationArgs& args) {
  return {args.trials, args.channels * args.height * args.width, args.height, args.width, total_variation_units(args)};
}

int64_t chunks_of(const Shape& shape) { return (shape.pixels + kChunk - 1) / kChunk; }

struct BlockSum {
  double of_warp[kWarps];
};

// The sum over the block, in thread 0.
__device__ __forceinline__ double block_total(double mine, BlockSum& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const double sum = warp_sum(mine);
  __syncthreads();  // the previous sums have been read by all threads
  if (lane == 0) shared.of_warp[warp] = sum;
#ifndef R2F_PLANTED_BUG  // the tests remove this barrier and must fail
  __syncthreads();
#endif
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) total += shared.of_warp[w];
  return total;
}

// Differences between pixel i of an image and its neighbors; 0 where there is no neighbor.
template <typename Acc>
struct Differences {
  Acc dx, dy;
  __device__ __forceinline__ Acc length() const {
    return sqrt(dx * dx + dy * dy + static_cast<Acc>(kTotalVariationEps));
  }
};

template <typename T>
__device__ __forceinline__ Differences<Accumulation<T>> differences(const T* image, int64_t i, const Shape& shape) {
  using Acc = Accumulation<T>;
  const int64_t column = i % shape.width, row = i / shape.width % shape.height;
  const Acc x = widen(image[i]);
  return {column + 1 < shape.width ? widen(image[i + 1]) - x : Acc(0),
          row + 1 < shape.height ? widen(image[i + shape.width]) - x : Acc(0)};
}

template <typename Acc>
__device__ __forceinline__ Acc magnitude(Acc v) {
  return v < 0 ? -v : v;
}

template <typename Acc>
__device__ __forceinline__ Acc sign(Acc v) {
  return static_cast<Acc>(v > 0) - static_cast<Acc>(v < 0);
}

template <typename T, bool kIsotropic>
__global__ void __launch_bounds__(kThreads) chunk_values(const T* images, Shape shape, int64_t chunks, double* values) {
  R2F_DYNAMIC_SHARED(BlockSum, shared);
  for (int64_t item = blockIdx.x; item < shape.trials * chunks; item += gridDim.x) {
    const T* image = images + item / chunks * shape.pixels;
    const int64_t begin = item % chunks * kChunk, end = begin + kChunk < shape.pixels ? begin + kChunk : shape.pixels;
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const auto d = differences(image, i, shape);
      if constexpr (kIsotropic)
        sum += shape.unit.pixel * d.length();
      else
        sum += shape.unit.row * magnitude(d.dy) + shape.unit.column * magnitude(d.dx);
    }
    const double total = block_total(sum, shared);
    if (threadIdx.x == 0) values[item] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    trial_values(const double* chunk_sums, int64_t trials, int64_t chunks, double* values) {
  R2F_DYNAMIC_SHARED(BlockSum, shared);
  for (int64_t t = blockIdx.x; t < trials; t += gridDim.x) {
    double sum = 0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) sum += chunk_sums[t * chunks + chunk];
    const double total = block_total(sum, shared);
    if (threadIdx.x == 0) values[t] = total;
  }
}

template <typename T, bool kIsotropic>
__global__ void __launch_bounds__(kThreads)
    gradient(const T* images, Shape shape, const Accumulation<T>* grads, double weight, Accumulation<T>* out) {
  using Acc = Accumulation<T>;
  const int64_t all = shape.trials * shape.pixels, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < all; index += step) {
    const int64_t t = index / shape.pixels, i = index % shape.pixels;
    const T* image = images + t * shape.pixels;
    const bool has_left = i % shape.width > 0, has_above = i / shape.width % shape.height > 0;
    const double factor = weight * grads[t];
    const Differences<Acc> none{0, 0}, own = differences(image, i, shape);
    const Differences<Acc> left = has_left ? differences(image, i - 1, shape) : none;
    const Differences<Acc> above = has_above ? differences(image, i - shape.width, shape) : none;
    Acc sum;
    if constexpr (kIsotropic) {
      sum = left.dx / left.length() + above.dy / above.length() - (own.dx + own.dy) / own.length();
      sum *= static_cast<Acc>(factor * shape.unit.pixel);
    } else {
      sum = static_cast<Acc>(factor * shape.unit.column) * (sign(left.dx) - sign(own.dx)) +
            static_cast<Acc>(factor * shape.unit.row) * (sign(above.dy) - sign(own.dy));
    }
    out[index] = sum;
  }
}

template <typename T, bool kIsotropic>
void run_values(const TotalVariationArgs& args, double* values, double* workspace, cudaStream_t stream) {
  const Shape shape = shape_of(args);
  const int64_t chunks = chunks_of(shape);
  if (chunks > 0)
    launch(chunk_values<T, kIsotropic>, grid_for(args.trials * chunks), kThreads, sizeof(BlockSum), stream,
           static_cast<const T*>(args.images), shape, chunks, workspace);
  launch(trial_values, grid_for(args.trials), kThreads, sizeof(BlockSum), stream, workspace, args.trials, chunks,
         values);
}

template <typename T, bool kIsotropic>
void run_gradient(const TotalVariationArgs& args, const void* grads, double weight, void* out, cudaStream_t stream) {
  using Acc = Accumulation<T>;
  const Shape shape = shape_of(args);
  const int64_t blocks = (shape.trials * shape.pixels + kThreads - 1) / kThreads;
  if (blocks > 0)
    launch(gradient<T, kIsotropic>, grid_for(blocks), kThreads, 0, stream, static_cast<const T*>(args.images), shape,
           static_cast<const Acc*>(grads), weight, static_cast<Acc*>(out));
}

template <typename T>
void run_values(const TotalVariationArgs& args, double* values, double* workspace, cudaStream_t stream) {
  args.isotropic ? run_values<T, true>(args, values, workspace, stream)
                 : run_values<T, false>(args, values, workspace, stream);
}

template <typename T>
void run_gradient(const TotalVariationArgs& args, const void* grads, double weight, void* out, cudaStream_t stream) {
  args.isotropic ? run_gradient<T, true>(args, grads, weight, out, stream)
                 : run_gradient<T, false>(args, grads, weight, out, stream);
}

}  // namespace

int64_t total_variation_cuda_workspace(const TotalVariationArgs& args) {
  return args.trials * chunks_of(shape_of(args));
}

const char* total_variation_cuda(DType dtype, const TotalVariationArgs& args, double* values, double* workspace,
                                 void* stream) {
  if (args.trials == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: run_values<float>(args, values, workspace, s); break;
    case DType::kFloat64: run_values<double>(args, values, workspace, s); break;
    case DType::kBFloat16: run_values<BFloat16>(args, values, workspace, s); break;
  }
  return launch_error();
}

const char* total_variation_backward_cuda(DType dtype, const TotalVariationArgs& args, const void* grads, double weight,
                                          void* grad_images, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: run_gradient<float>(args, grads, weight, grad_images, s); break;
    case DType::kFloat64: run_gradient<double>(args, grads, weight, grad_images, s); break;
    case DType::kBFloat16: run_gradient<BFloat16>(args, grads, weight, grad_images, s); break;
  }
  return launch_error();
}

}  // namespace r2f
