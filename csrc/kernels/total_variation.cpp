// Total variation on the CPU. See total_variation.h for what is computed.
//
// Forward: each row with the one below, summed in float64 row by row. Backward: each pixel gathers what its pairs (its
// neighbors', too, if isotropic) say, so every result is written once.
#include "kernels/total_variation.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

// One plane in the accumulation type; read in place unless it must be widened.
template <typename T>
R2F_INLINE const Accumulation<T>* plane_of(const TotalVariationArgs& args, int64_t plane,
                                           std::vector<Accumulation<T>>& room) {
  const int64_t size = args.height * args.width;
  const T* pixels = static_cast<const T*>(args.images) + plane * size;
  if constexpr (std::is_same_v<T, Accumulation<T>>) {
    return pixels;
  } else {
    room.resize(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) room[static_cast<size_t>(i)] = widen(pixels[i]);
    return room.data();
  }
}

// Vectors of `Bytes` bytes; with Bytes = sizeof(Acc) a single element, for the ends of rows.
template <typename Acc, int Bytes>
struct Lanes {
  using V = typename VectorOf<Acc, Bytes>::type;
  static constexpr int kCount = VectorOf<Acc, Bytes>::kLanes;
  static constexpr bool kOne = kCount == 1;

  R2F_INLINE static V magnitude(const V& v) { return v < 0 ? -v : v; }
  R2F_INLINE static V sign(const V& v) {
    const V one = V{} + 1, not_below = v > 0 ? one : V{};
    return v < 0 ? -one : not_below;
  }
  R2F_INLINE static V root(const V& v) {
    if constexpr (kOne)
      return V{static_cast<Acc>(__builtin_sqrt(v[0]))};
    else
      return simd::square_root<Acc, Bytes>(v);
  }
  R2F_INLINE static Acc total(const V& v) {
    if constexpr (kOne)
      return v[0];
    else
      return simd::sum_lanes<Acc, Bytes>(v);
  }
};

// The sum of |a - b| over as many whole vectors as there are; returns how far it came.
template <typename Acc, int Bytes>
R2F_INLINE int64_t add_differences(const Acc* a, const Acc* b, int64_t from, int64_t size, double& total) {
  using L = Lanes<Acc, Bytes>;
  using V = typename L::V;
  V sum{};
  int64_t i = from;
  for (; i + L::kCount <= size; i += L::kCount) {
    const V difference = simd::load<V>(a + i) - simd::load<V>(b + i);
    sum += L::magnitude(difference);
  }
  total += L::total(sum);
  return i;
}

template <typename Acc, int Bytes>
R2F_INLINE double sum_of_differences(const Acc* a, const Acc* b, int64_t size) {
  double total = 0;
  const int64_t i = add_differences<Acc, Bytes>(a, b, 0, size, total);
  add_differences<Acc, sizeof(Acc)>(a, b, i, size, total);
  return total;
}

// Of pixels from <= j < size of a row: right = row + 1, or row itself where a pixel has no neighbor there; below
// likewise.
template <typename Acc, int Bytes>
R2F_INLINE int64_t add_lengths(const Acc* row, const Acc* right, const Acc* below, int64_t from, int64_t size,
                               double& total) {
  using L = Lanes<Acc, Bytes>;
  using V = typename L::V;
  V sum{};
  int64_t j = from;
  for (; j + L::kCount <= size; j += L::kCount) {
    const V x = simd::load<V>(row + j), dx = simd::load<V>(right + j) - x, dy = simd::load<V>(below + j) - x;
    const V square = dx * dx + dy * dy + static_cast<Acc>(kTotalVariationEps);
    sum += L::root(square);
  }
  total += L::total(sum);
  return j;
}

template <typename T, int Bytes>
R2F_INLINE double plane_value(const TotalVariationArgs& args, const Accumulation<T>* pixels) {
  using Acc = Accumulation<T>;
  const TotalVariationUnits unit = total_variation_units(args);
  const int64_t h = args.height, w = args.width;
  double rows = 0, columns = 0, lengths = 0;
  for (int64_t i = 0; i < h; ++i) {
    const Acc* row = pixels + i * w;
    const Acc* below = i + 1 < h ? row + w : row;
    if (args.isotropic) {
      const int64_t j = add_lengths<Acc, Bytes>(row, row + 1, below, 0, w - 1, lengths);
      add_lengths<Acc, sizeof(Acc)>(row, row + 1, below, j, w - 1, lengths);
      add_lengths<Acc, sizeof(Acc)>(row, row, below, w - 1, w, lengths);
    } else {
      rows += sum_of_differences<Acc, Bytes>(below, row, w);
      columns += sum_of_differences<Acc, Bytes>(row + 1, row, w - 1);
    }
  }
  return args.isotropic ? unit.pixel * lengths : unit.row * rows + unit.column * columns;
}

// The rows around one row; a neighbor that is not there is the pixel itself: no difference, no gradient.
template <typename Acc>
struct Neighbors {
  const Acc *row, *above, *below, *left, *right;
};

template <typename Acc, int Bytes>
R2F_INLINE int64_t gather_signs(const Neighbors<Acc>& at, Acc row_factor, Acc column_factor, int64_t from, int64_t size,
                                Acc* grad) {
  using L = Lanes<Acc, Bytes>;
  using V = typename L::V;
  const auto load = [](const Acc* p) __attribute__((always_inline)) { return simd::load<V>(p); };
  int64_t j = from;
  for (; j + L::kCount <= size; j += L::kCount) {
    const V x = load(at.row + j);
    const V up = x - load(at.above + j), down = x - load(at.below + j);
    const V left = x - load(at.left + j), right = x - load(at.right + j);
    const V sum = (L::sign(up) + L::sign(down)) * row_factor + (L::sign(left) + L::sign(right)) * column_factor;
    simd::store(grad + j, sum);
  }
  return j;
}

template <typename Acc, int Bytes>
R2F_INLINE void anisotropic_gradient(const TotalVariationArgs& args, const Acc* pixels, double factor, Acc* grad) {
  const TotalVariationUnits unit = total_variation_units(args);
  const Acc by_row = static_cast<Acc>(factor * unit.row), by_column = static_cast<Acc>(factor * unit.column);
  const int64_t h = args.height, w = args.width;
  for (int64_t i = 0; i < h; ++i) {
    const Acc* row = pixels + i * w;
    Neighbors<Acc> at{row, i > 0 ? row - w : row, i + 1 < h ? row + w : row, row - 1, row + 1};
    Acc* to = grad + i * w;
    const int64_t j = gather_signs<Acc, Bytes>(at, by_row, by_column, 1, w - 1, to);
    gather_signs<Acc, sizeof(Acc)>(at, by_row, by_column, j, w - 1, to);
    for (const int64_t end : {int64_t{0}, w - 1}) {
      at.left = end > 0 ? row - 1 : row, at.right = end + 1 < w ? row + 1 : row;
      gather_signs<Acc, sizeof(Acc)>(at, by_row, by_column, end, end + 1, to);
    }
  }
}

// u = dx / length and v = dy / length.
template <typename Acc, int Bytes>
R2F_INLINE int64_t directions(const Acc* row, const Acc* right, const Acc* below, int64_t from, int64_t size, Acc* u,
                              Acc* v) {
  using L = Lanes<Acc, Bytes>;
  using V = typename L::V;
  int64_t j = from;
  for (; j + L::kCount <= size; j += L::kCount) {
    const V x = simd::load<V>(row + j), dx = simd::load<V>(right + j) - x, dy = simd::load<V>(below + j) - x;
    const V square = dx * dx + dy * dy + static_cast<Acc>(kTotalVariationEps), length = L::root(square);
    const V du = dx / length, dv = dy / length;
    simd::store(u + j, du);
    simd::store(v + j, dv);
  }
  return j;
}

template <typename Acc, int Bytes>
R2F_INLINE void isotropic_gradient(const TotalVariationArgs& args, const Acc* pixels, double factor, Acc* grad) {
  const Acc by_pixel = static_cast<Acc>(factor * total_variation_units(args).pixel);
  const int64_t h = args.height, w = args.width;
  std::vector<Acc> room(static_cast<size_t>(3 * w + 1), Acc(0));
  Acc *u = room.data() + 1, *v = u + w, *v_above = v + w;  // u[-1] = 0: nothing is left of a row
  for (int64_t i = 0; i < h; ++i) {
    const Acc* row = pixels + i * w;
    const Acc* below = i + 1 < h ? row + w : row;
    const int64_t j = directions<Acc, Bytes>(row, row + 1, below, 0, w - 1, u, v);
    directions<Acc, sizeof(Acc)>(row, row + 1, below, j, w - 1, u, v);
    directions<Acc, sizeof(Acc)>(row, row, below, w - 1, w, u, v);
    for (int64_t k = 0; k < w; ++k) grad[i * w + k] = by_pixel * (u[k - 1] - u[k] + v_above[k] - v[k]);
    std::swap(v, v_above);
  }
}

template <typename T, int Bytes>
R2F_INLINE void values(const TotalVariationArgs& args, int64_t first, int64_t last, double* of_planes) {
  std::vector<Accumulation<T>> room;
  for (int64_t plane = first; plane < last; ++plane)
    of_planes[plane] = plane_value<T, Bytes>(args, plane_of<T>(args, plane, room));
}

template <typename T, int Bytes>
R2F_INLINE void gradients(const TotalVariationArgs& args, const double* grads, double weight, void* grad_images,
                          int64_t first, int64_t last) {
  using Acc = Accumulation<T>;
  std::vector<Acc> room;
  for (int64_t plane = first; plane < last; ++plane) {
    const Acc* pixels = plane_of<T>(args, plane, room);
    const double factor = weight * grads[plane / args.channels];
    Acc* grad = static_cast<Acc*>(grad_images) + plane * args.height * args.width;
    if (args.isotropic)
      isotropic_gradient<Acc, Bytes>(args, pixels, factor, grad);
    else
      anisotropic_gradient<Acc, Bytes>(args, pixels, factor, grad);
  }
}

// What is wanted, in one piece: the entries below differ by instruction set only.
struct Wanted {
  double* of_planes;  // null: gradients
  const double* grads;
  double weight;
  void* grad_images;
};

template <typename T, int Bytes>
R2F_INLINE void run_planes(const TotalVariationArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  if (args.height == 0 || args.width == 0) {
    if (wanted.of_planes != nullptr) std::fill(wanted.of_planes + first, wanted.of_planes + last, 0.0);
    return;
  }
  if (wanted.of_planes != nullptr)
    values<T, Bytes>(args, first, last, wanted.of_planes);
  else
    gradients<T, Bytes>(args, wanted.grads, wanted.weight, wanted.grad_images, first, last);
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const TotalVariationArgs& args, const Wanted& wanted, int64_t first,
                          int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return run_planes<float, Bytes>(args, wanted, first, last);
    case DType::kFloat64: return run_planes<double, Bytes>(args, wanted, first, last);
    case DType::kBFloat16: return run_planes<BFloat16, Bytes>(args, wanted, first, last);
  }
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const TotalVariationArgs& args, const Wanted& wanted, int64_t first,
                                  int64_t last) {
  run_dtype<64>(dtype, args, wanted, first, last);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const TotalVariationArgs& args, const Wanted& wanted, int64_t first,
                              int64_t last) {
  run_dtype<32>(dtype, args, wanted, first, last);
}
#endif
void run_baseline(DType dtype, const TotalVariationArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  run_dtype<16>(dtype, args, wanted, first, last);
}

void run(DType dtype, const TotalVariationArgs& args, const Wanted& wanted, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, args, wanted, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, args, wanted, first, last);
#endif
    default: return run_baseline(dtype, args, wanted, first, last);
  }
}

}  // namespace

void total_variation_cpu(DType dtype, const TotalVariationArgs& args, int64_t first, int64_t last, double* of_planes) {
  run(dtype, args, {of_planes, nullptr, 0, nullptr}, first, last);
}

void total_variation_backward_cpu(DType dtype, const TotalVariationArgs& args, const double* grads, double weight,
                                  void* grad_images, int64_t first, int64_t last) {
  run(dtype, args, {nullptr, grads, weight, grad_images}, first, last);
}

}  // namespace r2f
