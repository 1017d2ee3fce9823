// Decoded gradients c basis against true ones delta^T x: what the kernels are asked. No torch and no CUDA here. Of each
// layer csrc/torch/decoder_sums.cpp makes some rows of both gradients at a time, a tile that stays in cache, by
// products of the library; here is what becomes of a tile.
#pragma once

#include <cstdint>

#include "r2f/dtype.h"

namespace r2f {

// Of one layer and sample, in float64: squares of small float32 numbers would underflow.
struct DecoderSums {
  double inner = 0, square = 0, true_square = 0;  // <decoded, true>, |decoded|^2, |true|^2
};

// Some rows of both gradients of each sample: [batch, size], contiguous, of the accumulation type; true ones in units.
struct DecoderTile {
  int64_t batch = 0, size = 0;
  void* decoded = nullptr;
  const void* truth = nullptr;
  double unit = 1;  // what true gradients were multiplied by
};

constexpr int64_t kDecoderPiece = 4096;  // elements whose sums one thread (one block) takes
R2F_HOST_DEVICE int64_t decoder_pieces(int64_t size) { return (size + kDecoderPiece - 1) / kDecoderPiece; }

// Items first <= item < last of decoder_pieces(size) * batch, item = piece * batch + sample: the sums of each, [items].
void decoder_piece_sums_cpu(DType dtype, const DecoderTile& tile, int64_t first, int64_t last, DecoderSums* of_pieces);
// decoded becomes dL/ddecoded = grads.inner truth + 2 grads.square decoded. grads [batch]; the same items.
void decoder_tile_gradient_cpu(DType dtype, const DecoderTile& tile, const DecoderSums* grads, int64_t first,
                               int64_t last);

// Queue their work on `stream` (a cudaStream_t) and return null, or what CUDA said went wrong.
const char* decoder_piece_sums_cuda(DType dtype, const DecoderTile& tile, DecoderSums* of_pieces, void* stream);
const char* decoder_tile_gradient_cuda(DType dtype, const DecoderTile& tile, const DecoderSums* grads, void* stream);

// sums [batch] of a layer's pieces [pieces, batch].
void decoder_add_pieces_cpu(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums);
const char* decoder_add_pieces_cuda(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums,
                                    void* stream);

}  // namespace r2f
