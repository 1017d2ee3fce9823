// The total variation of images in the kernels of matching_loss.cu. See total_variation.h for the formulas.
#pragma once

#include "kernels/matching_loss.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr uint32_t kPixels = 1024;  // of a chunk

// Pixels of a trial are numbered by 32 bits: divisions of 64 bits would take registers from the code for layers.
struct Variation {
  const void* images;
  void* gradient;
  uint32_t pixels, chunks, height, width;  // pixels and chunks: of a trial
  int64_t items;                           // the chunks of all trials
  TotalVariationUnits unit;
  double weight;
  bool isotropic;
};

Variation variation_of(const MatchingImages& images) {
  const TotalVariationArgs& args = images.args;
  Variation v{};
  v.images = args.images, v.gradient = images.gradient;
  v.pixels = static_cast<uint32_t>(args.channels * args.height * args.width);
  v.chunks = (v.pixels + kPixels - 1) / kPixels, v.items = args.trials * v.chunks;
  v.height = static_cast<uint32_t>(args.height), v.width = static_cast<uint32_t>(args.width);
  v.unit = total_variation_units(args), v.weight = images.weight, v.isotropic = args.isotropic;
  return v;
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
__device__ __forceinline__ Differences<Accumulation<T>> differences(const T* image, uint32_t i, const Variation& v) {
  using Acc = Accumulation<T>;
  const uint32_t column = i % v.width, row = i / v.width % v.height;
  const Acc x = widen(image[i]);
  return {column + 1 < v.width ? widen(image[i + 1]) - x : Acc(0),
          row + 1 < v.height ? widen(image[i + v.width]) - x : Acc(0)};
}

template <typename Acc>
__device__ __forceinline__ Acc magnitude(Acc v) {
  return v < 0 ? -v : v;
}

template <typename Acc>
__device__ __forceinline__ Acc sign(Acc v) {
  return static_cast<Acc>(v > 0) - static_cast<Acc>(v < 0);
}

// Of an item, in its trial.
__device__ __forceinline__ uint32_t first_pixel(const Variation& v, int64_t item) {
  return static_cast<uint32_t>(item % v.chunks) * kPixels;
}

// The thread's part of an item's total variation.
template <typename T>
__device__ __forceinline__ double variation_sum(const Variation& v, int64_t item) {
  const T* image = static_cast<const T*>(v.images) + item / v.chunks * v.pixels;
  const uint32_t begin = first_pixel(v, item), end = begin + kPixels < v.pixels ? begin + kPixels : v.pixels;
  double sum = 0;
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const auto d = differences(image, i, v);
    if (v.isotropic)
      sum += v.unit.pixel * d.length();
    else
      sum += v.unit.row * magnitude(d.dy) + v.unit.column * magnitude(d.dx);
  }
  return sum;
}

// Each pixel of an item gathers the derivatives of the differences that it is part of. `grad`: of the trial's loss.
template <typename T>
__device__ __forceinline__ void variation_gradient(const Variation& v, int64_t item, double grad) {
  using Acc = Accumulation<T>;
  const int64_t trial = item / v.chunks * v.pixels;
  const T* image = static_cast<const T*>(v.images) + trial;
  Acc* out = static_cast<Acc*>(v.gradient) + trial;
  const uint32_t begin = first_pixel(v, item), end = begin + kPixels < v.pixels ? begin + kPixels : v.pixels;
  const double factor = v.weight * grad;
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const bool has_left = i % v.width > 0, has_above = i / v.width % v.height > 0;
    const Differences<Acc> none{0, 0}, own = differences(image, i, v);
    const Differences<Acc> left = has_left ? differences(image, i - 1, v) : none;
    const Differences<Acc> above = has_above ? differences(image, i - v.width, v) : none;
    if (v.isotropic) {
      const Acc sum = left.dx / left.length() + above.dy / above.length() - (own.dx + own.dy) / own.length();
      out[i] = sum * static_cast<Acc>(factor * v.unit.pixel);
    } else {
      out[i] = static_cast<Acc>(factor * v.unit.column) * (sign(left.dx) - sign(own.dx)) +
               static_cast<Acc>(factor * v.unit.row) * (sign(above.dy) - sign(own.dy));
    }
  }
}

}  // namespace
}  // namespace r2f
