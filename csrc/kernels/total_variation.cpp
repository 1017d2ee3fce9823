// Total variation on the CPU. See total_variation.h for the formulas.
//
// Forward: differences between each row and the next, summed in float64 row by row. Backward: each pixel gathers the
// derivatives of the differences that it is part of, so every result is written once.
#include "kernels/total_variation.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

// The pixels of a plane in the accumulation type: in place, or widened into `buffer`.
template <typename T>
R2F_INLINE const Accumulation<T>* plane_of(const TotalVariationArgs& args, int64_t plane,
                                           std::vector<Accumulation<T>>& buffer) {
  const int64_t size = args.height * args.width;
  const T* pixels = static_cast<const T*>(args.images) + plane * size;
  if constexpr (std::is_same_v<T, Accumulation<T>>) {
    return pixels;
  } else {
    buffer.resize(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) buffer[static_cast<size_t>(i)] = widen(pixels[i]);
    return buffer.data();
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
  // v with its first `count` lanes set to 0.
  R2F_INLINE static V without_first(const V& v, int64_t count) {
    using Lane = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
    typename VectorOf<Lane, Bytes>::type number;
    for (int i = 0; i < kCount; ++i) number[i] = i;
    return number >= static_cast<Lane>(count) ? v : V{};
  }
};

// Calls step<bytes of a vector>(j, done) for vectors that cover from <= j < size: whole vectors, then one that ends at
// `size`, whose first `done` lanes overlap the one before. Rows shorter than a vector take narrower vectors.
template <typename Acc, int Bytes, typename Step>
R2F_INLINE void for_vectors(int64_t from, int64_t size, const Step& step) {
  constexpr int kCount = Lanes<Acc, Bytes>::kCount;
  int64_t j = from;
  for (; j + kCount <= size; j += kCount) step.template operator()<Bytes>(j, 0);
  if (j >= size) return;
  if constexpr (kCount > 1) {
    if (size - from >= kCount)
      step.template operator()<Bytes>(size - kCount, j + kCount - size);
    else
      for_vectors<Acc, (Bytes > 16 ? Bytes / 2 : static_cast<int>(sizeof(Acc)))>(from, size, step);
  }
}

// The sum of term<bytes of a vector>(j) over from <= j < size.
template <typename Acc, int Bytes, typename Term>
R2F_INLINE double sum_of(int64_t from, int64_t size, const Term& term) {
  typename Lanes<Acc, Bytes>::V sum{};
  double short_sum = 0;
  for_vectors<Acc, Bytes>(from, size, [&]<int B>(int64_t j, int64_t done) R2F_INLINE_LAMBDA {
    const auto values = term.template operator()<B>(j);
    const auto fresh = done == 0 ? values : Lanes<Acc, B>::without_first(values, done);
    if constexpr (B == Bytes)
      sum += fresh;
    else
      short_sum += Lanes<Acc, B>::total(fresh);
  });
  return short_sum + Lanes<Acc, Bytes>::total(sum);
}

template <typename Acc, int Bytes>
R2F_INLINE double sum_of_differences(const Acc* a, const Acc* b, int64_t size) {
  return sum_of<Acc, Bytes>(0, size, [&]<int B>(int64_t i) R2F_INLINE_LAMBDA {
    using V = typename Lanes<Acc, B>::V;
    const V difference = simd::load<V>(a + i) - simd::load<V>(b + i);
    return Lanes<Acc, B>::magnitude(difference);
  });
}

// The length of (right - row, below - row), lane by lane. right = row + 1, or row where a pixel has no right neighbor;
// below likewise.
template <typename Acc, int Bytes>
struct Slope {
  using V = typename Lanes<Acc, Bytes>::V;
  V dx, dy, length;
  R2F_INLINE Slope(const Acc* row, const Acc* right, const Acc* below) {
    const V x = simd::load<V>(row);
    dx = simd::load<V>(right) - x, dy = simd::load<V>(below) - x;
    const V square = dx * dx + dy * dy + static_cast<Acc>(kTotalVariationEps);
    length = Lanes<Acc, Bytes>::root(square);
  }
};

template <typename Acc, int Bytes>
R2F_INLINE double sum_of_lengths(const Acc* row, const Acc* right, const Acc* below, int64_t from, int64_t size) {
  return sum_of<Acc, Bytes>(from, size, [&]<int B>(int64_t j) R2F_INLINE_LAMBDA {
    return Slope<Acc, B>(row + j, right + j, below + j).length;
  });
}

template <typename T, int Bytes>
R2F_INLINE double plane_value(const TotalVariationArgs& args, const Accumulation<T>* pixels) {
  using Acc = Accumulation<T>;
  constexpr int kOne = sizeof(Acc);
  const TotalVariationUnits unit = total_variation_units(args);
  const int64_t h = args.height, w = args.width;
  double rows = 0, columns = 0, lengths = 0;
  for (int64_t i = 0; i < h; ++i) {
    const Acc* row = pixels + i * w;
    const Acc* below = i + 1 < h ? row + w : row;
    if (args.isotropic) {
      lengths += sum_of_lengths<Acc, Bytes>(row, row + 1, below, 0, w - 1);
      lengths += sum_of_lengths<Acc, kOne>(row, row, below, w - 1, w);
    } else {
      rows += sum_of_differences<Acc, Bytes>(below, row, w);
      columns += sum_of_differences<Acc, Bytes>(row + 1, row, w - 1);
    }
  }
  return args.isotropic ? unit.pixel * lengths : unit.row * rows + unit.column * columns;
}

// Pointers to a row and to its neighbors. A missing neighbor is replaced by the pixel itself: difference 0, gradient 0.
template <typename Acc>
struct Neighbors {
  const Acc *row, *above, *below, *left, *right;
};

template <typename Acc, int Bytes>
R2F_INLINE void gather_signs(const Neighbors<Acc>& at, Acc row_factor, Acc column_factor, int64_t from, int64_t size,
                             Acc* grad) {
  for_vectors<Acc, Bytes>(from, size, [&]<int B>(int64_t j, int64_t) R2F_INLINE_LAMBDA {
    using L = Lanes<Acc, B>;
    using V = typename L::V;
    const V x = simd::load<V>(at.row + j);
    const V up = x - simd::load<V>(at.above + j), down = x - simd::load<V>(at.below + j);
    const V left = x - simd::load<V>(at.left + j), right = x - simd::load<V>(at.right + j);
    const V sum = (L::sign(up) + L::sign(down)) * row_factor + (L::sign(left) + L::sign(right)) * column_factor;
    simd::store(grad + j, sum);
  });
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
    gather_signs<Acc, Bytes>(at, by_row, by_column, 1, w - 1, to);
    for (const int64_t end : {int64_t{0}, w - 1}) {
      at.left = end > 0 ? row - 1 : row, at.right = end + 1 < w ? row + 1 : row;
      gather_signs<Acc, sizeof(Acc)>(at, by_row, by_column, end, end + 1, to);
    }
  }
}

// u = dx / length and v = dy / length.
template <typename Acc, int Bytes>
R2F_INLINE void directions(const Acc* row, const Acc* right, const Acc* below, int64_t from, int64_t size, Acc* u,
                           Acc* v) {
  for_vectors<Acc, Bytes>(from, size, [&]<int B>(int64_t j, int64_t) R2F_INLINE_LAMBDA {
    using V = typename Lanes<Acc, B>::V;
    const Slope<Acc, B> at(row + j, right + j, below + j);
    const V du = at.dx / at.length, dv = at.dy / at.length;
    simd::store(u + j, du);
    simd::store(v + j, dv);
  });
}

template <typename Acc, int Bytes>
R2F_INLINE void isotropic_gradient(const TotalVariationArgs& args, const Acc* pixels, double factor, Acc* grad) {
  const Acc by_pixel = static_cast<Acc>(factor * total_variation_units(args).pixel);
  const int64_t h = args.height, w = args.width;
  std::vector<Acc> buffer(static_cast<size_t>(3 * w + 1), Acc(0));
  Acc *u = buffer.data() + 1, *v = u + w, *v_above = v + w;  // u[-1] = 0: the first pixel of a row has no left neighbor
  for (int64_t i = 0; i < h; ++i) {
    const Acc* row = pixels + i * w;
    const Acc* below = i + 1 < h ? row + w : row;
    directions<Acc, Bytes>(row, row + 1, below, 0, w - 1, u, v);
    directions<Acc, sizeof(Acc)>(row, row, below, w - 1, w, u, v);
    for_vectors<Acc, Bytes>(0, w, [&]<int B>(int64_t k, int64_t) R2F_INLINE_LAMBDA {
      using V = typename Lanes<Acc, B>::V;
      const V across = simd::load<V>(u + k - 1) - simd::load<V>(u + k);
      const V down = simd::load<V>(v_above + k) - simd::load<V>(v + k);
      const V sum = (across + down) * by_pixel;
      simd::store(grad + i * w + k, sum);
    });
    std::swap(v, v_above);
  }
}

}  // namespace

void total_variation_cpu(DType dtype, const TotalVariationArgs& args, int64_t first, int64_t last,
                         double* plane_values) {
  if (args.height == 0 || args.width == 0) {
    std::fill(plane_values + first, plane_values + last, 0.0);
    return;
  }
  simd::dispatch(dtype, [&]<typename T, int Bytes>() R2F_INLINE_LAMBDA {
    std::vector<Accumulation<T>> buffer;
    for (int64_t plane = first; plane < last; ++plane)
      plane_values[plane] = plane_value<T, Bytes>(args, plane_of<T>(args, plane, buffer));
  });
}

void total_variation_backward_cpu(DType dtype, const TotalVariationArgs& args, const double* grads, double weight,
                                  void* grad_images, int64_t first, int64_t last) {
  if (args.height == 0 || args.width == 0) return;
  simd::dispatch(dtype, [&]<typename T, int Bytes>() R2F_INLINE_LAMBDA {
    using Acc = Accumulation<T>;
    std::vector<Acc> buffer;
    for (int64_t plane = first; plane < last; ++plane) {
      const Acc* pixels = plane_of<T>(args, plane, buffer);
      const double factor = weight * grads[plane / args.channels];
      Acc* grad = static_cast<Acc*>(grad_images) + plane * args.height * args.width;
      if (args.isotropic)
        isotropic_gradient<Acc, Bytes>(args, pixels, factor, grad);
      else
        anisotropic_gradient<Acc, Bytes>(args, pixels, factor, grad);
    }
  });
}

}  // namespace r2f
