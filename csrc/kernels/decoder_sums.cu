// Tiles of decoded and true gradients on CUDA. See decoder_sums.h for what is computed.
//
//   piece_sums     one block takes a piece of a sample: three sums
//   add_pieces     one warp takes a sample: adds up its pieces
//   tile_gradient  one block takes a piece of a sample: the decoded gradient becomes the loss's with respect to it
//
// Each sum is taken in one fixed order: results are deterministic.
#include "kernels/decoder_sums.h"
#include "r2f/cuda.h"

namespace r2f {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

template <typename Acc>
constexpr int kPack = 16 / static_cast<int>(sizeof(Acc));

struct BlockSums {
  DecoderSums of_warp[kWarps];
};

__device__ __forceinline__ DecoderSums warp_total(const DecoderSums& s) {
  return {warp_sum(s.inner), warp_sum(s.square), warp_sum(s.true_square)};
}

__device__ __forceinline__ void add(DecoderSums& sum, const DecoderSums& other) {
  sum.inner += other.inner, sum.square += other.square, sum.true_square += other.true_square;
}

// Where a piece's elements are.
struct Piece {
  int64_t offset, size;
  __device__ Piece(const DecoderTile& tile, int64_t item) {
    const int64_t begin = item / tile.batch * kDecoderPiece, left = tile.size - begin;
    offset = item % tile.batch * tile.size + begin;
    size = left < kDecoderPiece ? left : kDecoderPiece;
  }
};

template <typename Acc>
__global__ void __launch_bounds__(kThreads) piece_sums(DecoderTile tile, bool aligned, DecoderSums* of_pieces) {
  constexpr int kVec = kPack<Acc>;
  R2F_DYNAMIC_SHARED(BlockSums, shared);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < decoder_pieces(tile.size) * tile.batch; item += gridDim.x) {
    const Piece piece(tile, item);
    const Acc* decoded = static_cast<const Acc*>(tile.decoded) + piece.offset;
    const Acc* truth = static_cast<const Acc*>(tile.truth) + piece.offset;
    DecoderSums mine;
    for (int64_t i = static_cast<int64_t>(thread) * kVec; i < piece.size; i += kThreads * kVec) {
      const bool whole = aligned && i + kVec <= piece.size;
      const auto a = load_pack<Acc, kVec>(decoded + i, piece.size - i, whole);
      const auto b = load_pack<Acc, kVec>(truth + i, piece.size - i, whole);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const double x = a.element[e], y = b.element[e];
        add(mine, {x * y, x * x, y * y});
      }
    }
    mine = warp_total(mine);
    __syncthreads();  // all have read the block's last sums
    if (thread % kWarpSize == 0) shared.of_warp[thread / kWarpSize] = mine;
#ifndef R2F_PLANTED_BUG  // the tests leave this barrier out and must notice
    __syncthreads();
#endif
    if (thread == 0) {
      DecoderSums total;
      for (int w = 0; w < kWarps; ++w) add(total, shared.of_warp[w]);
      of_pieces[item] = {total.inner / tile.unit, total.square, total.true_square / tile.unit / tile.unit};
    }
  }
}

__global__ void add_pieces(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums) {
  for (int64_t sample = blockIdx.x; sample < batch; sample += gridDim.x) {
    DecoderSums mine;
    for (int64_t piece = threadIdx.x; piece < pieces; piece += kWarpSize) add(mine, of_pieces[piece * batch + sample]);
    mine = warp_total(mine);
    if (threadIdx.x == 0) sums[sample] = mine;
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) tile_gradient(DecoderTile tile, bool aligned, const DecoderSums* grads) {
  constexpr int kVec = kPack<Acc>;
  for (int64_t item = blockIdx.x; item < decoder_pieces(tile.size) * tile.batch; item += gridDim.x) {
    const Piece piece(tile, item);
    Acc* decoded = static_cast<Acc*>(tile.decoded) + piece.offset;
    const Acc* truth = static_cast<const Acc*>(tile.truth) + piece.offset;
    const DecoderSums g = grads[item % tile.batch];
    const double of_truth = g.inner / tile.unit, of_decoded = 2 * g.square;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kVec; i < piece.size; i += kThreads * kVec) {
      const bool whole = aligned && i + kVec <= piece.size;
      auto a = load_pack<Acc, kVec>(decoded + i, piece.size - i, whole);
      const auto b = load_pack<Acc, kVec>(truth + i, piece.size - i, whole);
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        a.element[e] = static_cast<Acc>(of_decoded * a.element[e] + of_truth * b.element[e]);
      store_pack(decoded + i, a, piece.size - i, whole);
    }
  }
}

template <typename Acc>
bool is_aligned(const DecoderTile& tile) {
  const uintptr_t both = reinterpret_cast<uintptr_t>(tile.decoded) | reinterpret_cast<uintptr_t>(tile.truth);
  return both % 16 == 0 && (tile.batch == 1 || tile.size % kPack<Acc> == 0);
}

template <typename Acc>
void run_sums(const DecoderTile& tile, DecoderSums* of_pieces, cudaStream_t stream) {
  launch(piece_sums<Acc>, grid_for(decoder_pieces(tile.size) * tile.batch), kThreads, sizeof(BlockSums), stream, tile,
         is_aligned<Acc>(tile), of_pieces);
}

template <typename Acc>
void run_gradient(const DecoderTile& tile, const DecoderSums* grads, cudaStream_t stream) {
  launch(tile_gradient<Acc>, grid_for(decoder_pieces(tile.size) * tile.batch), kThreads, 0, stream, tile,
         is_aligned<Acc>(tile), grads);
}

}  // namespace

const char* decoder_piece_sums_cuda(DType dtype, const DecoderTile& tile, DecoderSums* of_pieces, void* stream) {
  if (tile.size * tile.batch == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  dtype == DType::kFloat64 ? run_sums<double>(tile, of_pieces, s) : run_sums<float>(tile, of_pieces, s);
  return launch_error();
}

const char* decoder_tile_gradient_cuda(DType dtype, const DecoderTile& tile, const DecoderSums* grads, void* stream) {
  if (tile.size * tile.batch == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  dtype == DType::kFloat64 ? run_gradient<double>(tile, grads, s) : run_gradient<float>(tile, grads, s);
  return launch_error();
}

const char* decoder_add_pieces_cuda(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums,
                                    void* stream) {
  if (batch == 0) return nullptr;
  launch(add_pieces, grid_for(batch), kWarpSize, 0, static_cast<cudaStream_t>(stream), of_pieces, pieces, batch, sums);
  return launch_error();
}

}  // namespace r2f
