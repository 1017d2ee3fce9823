// Tiles of decoded and true gradients on the CPU. See decoder_sums.h for what is computed.
#include "kernels/decoder_sums.h"

#include <algorithm>

#include "r2f/simd.h"

namespace r2f {
namespace {

using simd::VectorOf;

// The elements of one piece of one sample.
struct Piece {
  int64_t offset, size;
  Piece(const DecoderTile& tile, int64_t item) {
    const int64_t begin = item / tile.batch * kDecoderPiece;
    offset = item % tile.batch * tile.size + begin;
    size = std::min(kDecoderPiece, tile.size - begin);
  }
};

template <typename Acc, int Bytes>
R2F_INLINE DecoderSums piece_sums(const Acc* decoded, const Acc* truth, int64_t size, double unit) {
  using V = typename VectorOf<double, Bytes>::type;
  constexpr int kLanes = VectorOf<double, Bytes>::kLanes;
  using Narrow = typename VectorOf<Acc, kLanes* static_cast<int>(sizeof(Acc))>::type;
  V sum[2][3] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const V a = __builtin_convertvector(simd::load<Narrow>(decoded + i + h * kLanes), V);
      const V b = __builtin_convertvector(simd::load<Narrow>(truth + i + h * kLanes), V);
      sum[h][0] += a * b, sum[h][1] += a * a, sum[h][2] += b * b;
    }
  }
  double total[3];
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    const V both = sum[0][k] + sum[1][k];
    total[k] = simd::sum_lanes<double, Bytes>(both);
  }
  for (; i < size; ++i) {
    const double a = decoded[i], b = truth[i];
    total[0] += a * b, total[1] += a * a, total[2] += b * b;
  }
  return {total[0] / unit, total[1], total[2] / unit / unit};
}

template <typename Acc, int Bytes>
R2F_INLINE void piece_gradient(Acc* decoded, const Acc* truth, int64_t size, double of_truth, double of_decoded) {
  using V = typename VectorOf<double, Bytes>::type;
  constexpr int kLanes = VectorOf<double, Bytes>::kLanes;
  using Narrow = typename VectorOf<Acc, kLanes* static_cast<int>(sizeof(Acc))>::type;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const V a = __builtin_convertvector(simd::load<Narrow>(decoded + i), V);
    const V b = __builtin_convertvector(simd::load<Narrow>(truth + i), V);
    const V gradient = a * of_decoded + b * of_truth;
    simd::store(decoded + i, __builtin_convertvector(gradient, Narrow));
  }
  for (; i < size; ++i) decoded[i] = static_cast<Acc>(of_decoded * decoded[i] + of_truth * truth[i]);
}

// What is asked: sums, or with `grads` the gradient.
struct Wanted {
  DecoderSums* of_pieces;
  const DecoderSums* grads;
};

template <typename Acc, int Bytes>
R2F_INLINE void run_items(const DecoderTile& tile, const Wanted& wanted, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    const Piece piece(tile, item);
    Acc* decoded = static_cast<Acc*>(tile.decoded) + piece.offset;
    const Acc* truth = static_cast<const Acc*>(tile.truth) + piece.offset;
    if (wanted.grads == nullptr) {
      wanted.of_pieces[item] = piece_sums<Acc, Bytes>(decoded, truth, piece.size, tile.unit);
    } else {
      const DecoderSums& g = wanted.grads[item % tile.batch];
      piece_gradient<Acc, Bytes>(decoded, truth, piece.size, g.inner / tile.unit, 2 * g.square);
    }
  }
}

template <int Bytes>
R2F_INLINE void run_dtype(DType dtype, const DecoderTile& tile, const Wanted& wanted, int64_t first, int64_t last) {
  if (dtype == DType::kFloat64)
    run_items<double, Bytes>(tile, wanted, first, last);
  else
    run_items<float, Bytes>(tile, wanted, first, last);
}

#ifdef R2F_X86_DISPATCH
R2F_TARGET_AVX512 void run_avx512(DType dtype, const DecoderTile& tile, const Wanted& wanted, int64_t first,
                                  int64_t last) {
  run_dtype<64>(dtype, tile, wanted, first, last);
}
R2F_TARGET_AVX2 void run_avx2(DType dtype, const DecoderTile& tile, const Wanted& wanted, int64_t first, int64_t last) {
  run_dtype<32>(dtype, tile, wanted, first, last);
}
#endif
void run_baseline(DType dtype, const DecoderTile& tile, const Wanted& wanted, int64_t first, int64_t last) {
  run_dtype<16>(dtype, tile, wanted, first, last);
}

void run(DType dtype, const DecoderTile& tile, const Wanted& wanted, int64_t first, int64_t last) {
  switch (simd::best_isa()) {
#ifdef R2F_X86_DISPATCH
    case simd::Isa::kAvx512: return run_avx512(dtype, tile, wanted, first, last);
    case simd::Isa::kAvx2: return run_avx2(dtype, tile, wanted, first, last);
#endif
    default: return run_baseline(dtype, tile, wanted, first, last);
  }
}

}  // namespace

void decoder_piece_sums_cpu(DType dtype, const DecoderTile& tile, int64_t first, int64_t last, DecoderSums* of_pieces) {
  run(dtype, tile, {of_pieces, nullptr}, first, last);
}

void decoder_tile_gradient_cpu(DType dtype, const DecoderTile& tile, const DecoderSums* grads, int64_t first,
                               int64_t last) {
  run(dtype, tile, {nullptr, grads}, first, last);
}

void decoder_add_pieces_cpu(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums) {
  std::fill(sums, sums + batch, DecoderSums{});
  for (int64_t item = 0; item < pieces * batch; ++item) {
    DecoderSums& sum = sums[item % batch];
    const DecoderSums& piece = of_pieces[item];
    sum.inner += piece.inner, sum.square += piece.square, sum.true_square += piece.true_square;
  }
}

}  // namespace r2f
