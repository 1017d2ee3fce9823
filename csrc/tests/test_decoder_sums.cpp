// decoder_sums against plain double loops. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the CUDA
// source run by the emulator.
#include <exception>
#include <stdexcept>
#include <string>

#include "check.h"
#include "kernels/decoder_sums.h"

namespace r2f::test {
namespace {

using Doubles = std::vector<double>;

#ifdef R2F_TEST_EMULATED
void check_error(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}
#endif

void run(DType dtype, const DecoderTile& tile, std::vector<DecoderSums>& of_pieces, std::vector<DecoderSums>& sums,
         const std::vector<DecoderSums>& grads) {
  const int64_t pieces = decoder_pieces(tile.size);
#ifdef R2F_TEST_EMULATED
  check_error(decoder_piece_sums_cuda(dtype, tile, of_pieces.data(), nullptr));
  check_error(decoder_add_pieces_cuda(of_pieces.data(), pieces, tile.batch, sums.data(), nullptr));
  check_error(decoder_tile_gradient_cuda(dtype, tile, grads.data(), nullptr));
#else
  const int64_t items = pieces * tile.batch;  // in two parts, as two threads would
  decoder_piece_sums_cpu(dtype, tile, items / 3, items, of_pieces.data());
  decoder_piece_sums_cpu(dtype, tile, 0, items / 3, of_pieces.data());
  decoder_add_pieces_cpu(of_pieces.data(), pieces, tile.batch, sums.data());
  decoder_tile_gradient_cpu(dtype, tile, grads.data(), items / 3, items);
  decoder_tile_gradient_cpu(dtype, tile, grads.data(), 0, items / 3);
#endif
}

int check(DType dtype, int64_t batch, int64_t size, int64_t shift) {
  std::mt19937 random(static_cast<unsigned>(batch + size));
  Array decoded(dtype, shift + batch * size, random), truth(dtype, shift + batch * size, random);
  const DecoderTile tile{batch, size, decoded.at(shift), truth.at(shift), 4.0};
  std::vector<DecoderSums> want(static_cast<size_t>(batch)), grads, sums(want.size());
  std::vector<DecoderSums> of_pieces(static_cast<size_t>(decoder_pieces(size) * batch), {NAN, NAN, NAN});
  Doubles gradient(decoded.values.begin(), decoded.values.begin() + shift);
  for (int64_t s = 0; s < batch; ++s) {
    grads.push_back({0.5 + static_cast<double>(s), -0.25, 7});
    for (int64_t i = 0; i < size; ++i) {
      const size_t at = static_cast<size_t>(shift + s * size + i);
      const double a = decoded.values[at], b = truth.values[at] / tile.unit;
      DecoderSums& sum = want[static_cast<size_t>(s)];
      sum.inner += a * b, sum.square += a * a, sum.true_square += b * b;
      gradient.push_back(grads.back().inner * b + 2 * grads.back().square * a);
    }
  }
  int wrong = 0;
  try {
    run(dtype, tile, of_pieces, sums, grads);
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    return 1;
  }
  for (size_t s = 0; s < want.size(); ++s) {
    const double tolerance = 1e-12 * (want[s].square + want[s].true_square);
    const bool right = std::fabs(sums[s].inner - want[s].inner) <= tolerance &&
                       std::fabs(sums[s].square - want[s].square) <= tolerance &&
                       std::fabs(sums[s].true_square - want[s].true_square) <= tolerance;
    if (!right) std::printf("WRONG sums of sample %zu\n", s), ++wrong;
  }
  wrong += compare("gradient", decoded, dtype, gradient);
  if (wrong != 0)
    std::printf("  in %s batch %lld size %lld shift %lld\n", name_of(dtype), static_cast<long long>(batch),
                static_cast<long long>(size), static_cast<long long>(shift));
  return wrong;
}

int all(bool quick) {
  int wrong = 0, count = 0;
  for (int64_t size : {0, 1, 7, 33, 4095, 4096, 4097, 12291})
    for (int64_t batch : {0, 1, 3})
      for (int64_t shift : {0, 1})  // off every boundary
        for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
          if (quick && size > 5000) continue;
          wrong += check(dtype, batch, size, shift), ++count;
        }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
