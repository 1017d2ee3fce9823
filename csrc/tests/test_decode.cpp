// decode against plain double loops. Compiled twice: for the CPU kernel, and with R2F_TEST_EMULATED for the CUDA source
// run by the emulator.
#include <exception>
#include <stdexcept>
#include <string>

#include "check.h"
#include "kernels/decode.h"

namespace r2f::test {
namespace {

using Doubles = std::vector<double>;

DType accumulation(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

#ifdef R2F_TEST_EMULATED
void check_error(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}
void run(DType dtype, const DecodeStage<DecodeMap>& stage, Activation activation) {
  check_error(decode_maps_cuda(dtype, stage, activation, nullptr));
}
void run(DType dtype, const DecodeStage<DecodeHead>& stage) { check_error(decode_heads_cuda(dtype, stage, nullptr)); }
void run(DType dtype, const DecodeStage<DecodeNorm>& stage) { check_error(decode_norms_cuda(dtype, stage, nullptr)); }
#else
// In two parts, as two threads would.
void run(DType dtype, const DecodeStage<DecodeMap>& stage, Activation) {
  const int64_t items = decode_items(stage);
  decode_maps_cpu(dtype, stage, items / 3, items);
  decode_maps_cpu(dtype, stage, 0, items / 3);
}
void run(DType dtype, const DecodeStage<DecodeHead>& stage) {
  const int64_t items = decode_items(dtype, stage);
  decode_heads_cpu(dtype, stage, items / 3, items);
  decode_heads_cpu(dtype, stage, 0, items / 3);
}
void run(DType dtype, const DecodeStage<DecodeNorm>& stage) {
  decode_norms_cpu(dtype, stage, 0, stage.count / 2);
  decode_norms_cpu(dtype, stage, stage.count / 2, stage.count);
}
#endif

// What maps are tried with: an activation; with bias, norms and `before`, or with none of them.
const std::vector<std::pair<Activation, bool>> kTries = {
#ifdef R2F_TEST_EMULATED
    {Activation::kGelu, true},
    {Activation::kRelu, true},
#else  // the kernel has no activations
    {Activation::kIdentity, true},
#endif
    {Activation::kIdentity, false}};

double activated(Activation activation, double v) {
  if (activation == Activation::kGelu) return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
  return activation == Activation::kRelu ? std::fmax(v, 0) : v;
}

// One matrix of one layer, as a map and as a basis, with its input; the matrix starts `shift` elements into its memory.
struct Layer {
  int64_t rows, columns, shift;
  Array matrix, bias, in, norms, before, out, head_in, head_out;

  Layer(DType dtype, int64_t batch, int64_t rows_, int64_t columns_, int64_t shift_, std::mt19937& random)
      : rows(rows_),
        columns(columns_),
        shift(shift_),
        matrix(dtype, shift_ + rows_ * columns_, random),
        bias(dtype, rows_, random),
        in(accumulation(dtype), batch * columns_, random),
        norms(accumulation(dtype), batch, random, false),
        before(accumulation(dtype), batch * rows_, random, false),
        out(accumulation(dtype), batch * rows_, random, false),
        head_in(accumulation(dtype), batch * rows_, random),
        head_out(accumulation(dtype), batch * columns_, random, false) {}

  double at(int64_t r, int64_t c) const { return matrix.values[static_cast<size_t>(shift + r * columns + c)]; }
};

// Of the whole matrices, or of their first two thirds of columns.
int check_heads(DType dtype, int64_t batch, std::vector<Layer>& layers, bool whole) {
  const auto size_of = [&](const Layer& l) { return whole ? l.columns : l.columns - l.columns / 3; };
  std::vector<DecodeHead> heads;
  for (Layer& l : layers)
    heads.push_back({l.rows, size_of(l), l.columns, l.matrix.at(l.shift), l.head_in.data(), l.head_out.data()});
  run(dtype, DecodeStage<DecodeHead>{heads.data(), static_cast<int64_t>(heads.size()), batch});
  int wrong = 0;
  for (Layer& l : layers) {
    const int64_t size = size_of(l);
    Doubles want(static_cast<size_t>(batch * size));
    for (int64_t s = 0; s < batch; ++s)
      for (int64_t r = 0; r < l.rows; ++r)
        for (int64_t c = 0; c < size; ++c)
          want[static_cast<size_t>(s * size + c)] += l.head_in.values[static_cast<size_t>(s * l.rows + r)] * l.at(r, c);
    wrong += compare("head", l.head_out, accumulation(dtype), want);
  }
  return wrong;
}

int check_maps(DType dtype, int64_t batch, std::vector<Layer>& layers, Activation activation, bool all) {
  const DType wide = accumulation(dtype);
  std::vector<DecodeNorm> norms;
  std::vector<DecodeMap> maps;
  for (Layer& l : layers) {
    if (batch > 1)  // one sample of nothing
      for (int64_t c = 0; c < l.columns; ++c) l.in.set(l.columns + c, 0);
    norms.push_back({l.columns, l.in.data(), l.norms.data()});
    DecodeMap map{l.rows,  l.columns, l.matrix.at(l.shift), nullptr, l.in.data(), nullptr, l.out.data(),
                  nullptr, nullptr};
    if (all) map.bias = l.bias.data(), map.before = l.before.data(), map.divisor = map.factor = l.norms.data();
    maps.push_back(map);
  }
  const int64_t count = static_cast<int64_t>(layers.size());
  run(dtype, DecodeStage<DecodeNorm>{norms.data(), count, batch});
  run(dtype, DecodeStage<DecodeMap>{maps.data(), count, batch}, activation);
  int wrong = 0;
  for (Layer& l : layers) {
    Doubles lengths, before, out;
    for (int64_t s = 0; s < batch; ++s) {
      const double* in = l.in.values.data() + s * l.columns;
      double square = 0;
      for (int64_t c = 0; c < l.columns; ++c) square += in[c] * in[c];
      lengths.push_back(std::sqrt(square));
      for (int64_t r = 0; r < l.rows; ++r) {
        double sum = 0;
        for (int64_t c = 0; c < l.columns; ++c) sum += l.at(r, c) * in[c];
        if (all) sum = (square == 0 ? 0 : sum / std::sqrt(square)) + l.bias.values[static_cast<size_t>(r)];
        before.push_back(sum);
        out.push_back(activated(activation, sum) * (all ? std::sqrt(square) : 1));
      }
    }
    wrong += compare("norms", l.norms, wide, lengths) + compare("out", l.out, wide, out);
    if (all) wrong += compare("before", l.before, wide, before);
  }
  return wrong;
}

int check(DType dtype, int64_t batch, const std::vector<std::pair<int64_t, int64_t>>& sizes, int64_t shift) {
  int wrong = 0;
  try {
    for (const auto& [activation, all] : kTries) {
      std::mt19937 random(static_cast<unsigned>(batch + shift));
      std::vector<Layer> layers;
      for (const auto& [rows, columns] : sizes) layers.emplace_back(dtype, batch, rows, columns, shift, random);
      wrong += check_maps(dtype, batch, layers, activation, all);
      if (all && activation == kTries[0].first)
        for (const bool whole : {true, false}) wrong += check_heads(dtype, batch, layers, whole);
    }
  } catch (const std::exception& error) {
    std::printf("WRONG %s\n", error.what());
    ++wrong;
  }
  if (wrong != 0)
    std::printf("  in %s batch %lld shift %lld, %zu layers\n", name_of(dtype), static_cast<long long>(batch),
                static_cast<long long>(shift), sizes.size());
  return wrong;
}

int all(bool quick) {
  // Sizes 0 and 1, and one below, at and past a pack, a warp's columns, a thread block's, a chunk of coefficients, an
  // item.
  std::vector<std::pair<int64_t, int64_t>> some{{1, 1}, {0, 5}, {5, 0}, {9, 127}, {8, 128}, {17, 129}, {3, 513}},
      many = some;
  for (const auto& each : {std::pair<int64_t, int64_t>{256, 24}, {257, 33}, {2, 4097}, {23, 1024}, {40, 8}})
    many.push_back(each);
  const std::vector<std::pair<int64_t, int64_t>> table(35, {3, 9});  // more layers than one launch takes
  int wrong = 0, count = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16})
    for (int64_t shift : {0, 1}) {  // off every boundary
      for (int64_t batch : {0, 1, 2, 3, 7, 8, 9}) {
        if (quick && batch > 3) continue;
        wrong += check(dtype, batch, quick ? some : many, shift), ++count;
      }
      wrong += check(dtype, 2, table, shift), ++count;
    }
  std::printf("%d of %d cases wrong\n", wrong, count);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace r2f::test

int main(int argc, char** argv) { return r2f::test::all(argc > 1 && std::string(argv[1]) == "quick"); }
