// torch.ops.r2f.decoder_sums and its backward on compiled kernels. The schemas and the meaning are in r2f_ext/ops. Both
// gradients exist one tile at a time, in scratch memory that stays in cache: made by products of the library, summed or
// turned into the loss's gradient by the kernels, and forgotten.
#include "kernels/decoder_sums.h"

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels/decode.h"
#include "kernels/factored_matching_loss.h"
#include "torch/glue.h"

namespace r2f {
namespace {

using Tensors = std::vector<at::Tensor>;

// The kernels on one device or the other, and the elements of a tile, which stays in the last-level cache.
struct OnCpu {
  static constexpr int64_t kTile = 1 << 21;
  // decoded = c basis. Small batches by the decoders' kernel, which reads the basis at the speed of memory.
  static void decode(DType dtype, const at::Tensor& c, const at::Tensor& basis, at::Tensor decoded) {
    if (c.size(0) > kDecodeHeadBatchCpu || basis.stride(1) != 1 || basis.scalar_type() != c.scalar_type()) {
      at::mm_out(decoded, c, basis.to(c.scalar_type()));
      return;
    }
    const DecodeHead head{basis.size(0),          basis.size(1),      basis.stride(0),
                          basis.const_data_ptr(), c.const_data_ptr(), decoded.mutable_data_ptr()};
    const DecodeStage<DecodeHead> stage{&head, 1, c.size(0)};
    at::parallel_for(0, decode_items(dtype, stage), 1,
                     [&](int64_t first, int64_t last) { decode_heads_cpu(dtype, stage, first, last); });
  }
  static void sums(DType dtype, const DecoderTile& tile, DecoderSums* of_pieces, const at::Device&) {
    at::parallel_for(0, decoder_pieces(tile.size) * tile.batch, 4,
                     [&](int64_t first, int64_t last) { decoder_piece_sums_cpu(dtype, tile, first, last, of_pieces); });
  }
  static void gradient(DType dtype, const DecoderTile& tile, const DecoderSums* grads, const at::Device&) {
    at::parallel_for(0, decoder_pieces(tile.size) * tile.batch, 4,
                     [&](int64_t first, int64_t last) { decoder_tile_gradient_cpu(dtype, tile, grads, first, last); });
  }
  static void add(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums, const at::Device&) {
    decoder_add_pieces_cpu(of_pieces, pieces, batch, sums);
  }
};

#ifdef R2F_WITH_CUDA
struct OnCuda {
  static constexpr int64_t kTile = 1 << 22;
  static void decode(DType, const at::Tensor& c, const at::Tensor& basis, at::Tensor decoded) {
    at::mm_out(decoded, c, basis.to(c.scalar_type()));
  }
  static void sums(DType dtype, const DecoderTile& tile, DecoderSums* of_pieces, const at::Device& device) {
    glue::check_launch("decoder_sums", decoder_piece_sums_cuda(dtype, tile, of_pieces, glue::current_stream(device)));
  }
  static void gradient(DType dtype, const DecoderTile& tile, const DecoderSums* grads, const at::Device& device) {
    glue::check_launch("decoder_sums", decoder_tile_gradient_cuda(dtype, tile, grads, glue::current_stream(device)));
  }
  static void add(const DecoderSums* of_pieces, int64_t pieces, int64_t batch, DecoderSums* sums,
                  const at::Device& device) {
    glue::check_launch("decoder_sums",
                       decoder_add_pieces_cuda(of_pieces, pieces, batch, sums, glue::current_stream(device)));
  }
};
#endif

void check_layer(const at::Tensor& c, const at::Tensor& basis, const at::Tensor& x, const at::Tensor& delta,
                 const at::Tensor& first) {
  TORCH_CHECK(x.dim() == 3 && delta.dim() == 3 && x.size(0) == first.size(0) && x.size(0) == delta.size(0) &&
                  x.size(1) == delta.size(1),
              "decoder_sums: x must be [b, N, d_in] and delta [b, N, d_out]");
  TORCH_CHECK(c.dim() == 2 && c.size(0) == x.size(0) && basis.dim() == 2 && basis.size(0) == c.size(1) &&
                  basis.size(1) == delta.size(2) * x.size(2),
              "decoder_sums: coefficients must be [b, k] and bases [k, d_out d_in]");
  for (const at::Tensor& t : {c, basis, x, delta})
    TORCH_CHECK(t.scalar_type() == first.scalar_type() && t.device() == first.device(),
                "decoder_sums: one dtype and one device");
}

struct Call {
  at::TensorList coefficients, bases, x, delta;
  DType dtype;
  int64_t batch;
  at::TensorOptions result;
  at::Device device;

  size_t layers() const { return x.size(); }
  at::Tensor wide(const at::Tensor& tensor) const { return tensor.to(result.dtype().toScalarType()); }
  // Rows of d_out in a tile: it and its part of the basis have at most `most` elements each, but at least one row.
  int64_t rows(size_t l, int64_t most) const {
    const int64_t row = std::max<int64_t>(std::max(batch, bases[l].size(0)) * x[l].size(2), 1);
    return std::clamp<int64_t>(most / row, 1, std::max<int64_t>(delta[l].size(2), 1));
  }
  at::Tensor scratch(int64_t most) const {  // for two tiles
    int64_t size = 0;
    for (size_t l = 0; l < layers(); ++l) size = std::max(size, batch * rows(l, most) * x[l].size(2));
    return at::empty({2, size}, result);
  }
};

Call prepare(at::TensorList coefficients, at::TensorList bases, at::TensorList x, at::TensorList delta) {
  const size_t count = x.size();
  TORCH_CHECK(count > 0 && coefficients.size() == count && bases.size() == count && delta.size() == count,
              "decoder_sums: as many coefficients, bases, x and delta, and at least one");
  for (size_t l = 0; l < count; ++l) check_layer(coefficients[l], bases[l], x[l], delta[l], x[0]);
  return {coefficients, bases, x, delta, glue::dtype_of("decoder_sums", x[0]), x[0].size(0), glue::result_options(x[0]),
          x[0].device()};
}

// One layer, tile by tile.
template <typename Device>
class Layer {
 public:
  Layer(const Call& call, size_t l, int64_t most, const at::Tensor& scratch)
      : call_(call),
        c_(call.wide(call.coefficients[l]).contiguous()),
        basis_(call.bases[l]),
        x_(call.wide(call.x[l])),
        delta_(at::mul(call.wide(call.delta[l]), delta_unit(call.dtype))),
        scratch_(scratch),
        d_out_(delta_.size(2)),
        d_in_(x_.size(2)),
        rows_(call.rows(l, most)) {}

  // work(tile, its decoded gradients, the first of the basis's columns that it is made of)
  template <typename Work>
  void for_tiles(const Work& work) const {
    if (call_.batch * d_in_ == 0) return;
    for (int64_t row = 0; row < d_out_; row += rows_) {
      const int64_t rows = std::min(rows_, d_out_ - row), size = rows * d_in_;
      at::Tensor decoded = scratch_[0].narrow(0, 0, call_.batch * size).view({call_.batch, size});
      at::Tensor truth = scratch_[1].narrow(0, 0, call_.batch * size).view({call_.batch, rows, d_in_});
      Device::decode(call_.dtype, c_, basis_.narrow(1, row * d_in_, size), decoded);
      at::bmm_out(truth, delta_.narrow(2, row, rows).mT(), x_);
      work(DecoderTile{call_.batch, size, decoded.mutable_data_ptr(), truth.const_data_ptr(), delta_unit(call_.dtype)},
           decoded, row * d_in_);
    }
  }
  int64_t pieces() const {
    return d_out_ / rows_ * decoder_pieces(rows_ * d_in_) + decoder_pieces(d_out_ % rows_ * d_in_);
  }
  const at::Tensor& coefficients() const { return c_; }

 private:
  const Call& call_;
  at::Tensor c_, basis_, x_, delta_, scratch_;
  int64_t d_out_, d_in_, rows_;
};

DecoderSums* sums_of(const at::Tensor& tensor) { return static_cast<DecoderSums*>(tensor.mutable_data_ptr()); }

template <typename Device>
at::Tensor forward(at::TensorList coefficients, at::TensorList bases, at::TensorList x, at::TensorList delta) {
  TORCH_CHECK(!x.empty(), "decoder_sums: at least one layer");
  const c10::DeviceGuard guard(x[0].device());
  const Call call = prepare(coefficients, bases, x, delta);
  const at::TensorOptions doubles = call.result.dtype(at::kDouble);
  const at::Tensor scratch = call.scratch(Device::kTile);
  const at::Tensor sums = at::empty({static_cast<int64_t>(call.layers()), call.batch, 3}, doubles);
  for (size_t l = 0; l < call.layers(); ++l) {
    const Layer<Device> layer(call, l, Device::kTile, scratch);
    const int64_t pieces = call.batch == 0 ? 0 : layer.pieces();
    const at::Tensor of_pieces = at::empty({pieces, call.batch, 3}, doubles);
    DecoderSums* next = sums_of(of_pieces);
    layer.for_tiles([&](const DecoderTile& tile, const at::Tensor&, int64_t) {
      Device::sums(call.dtype, tile, next, call.device);
      next += decoder_pieces(tile.size) * call.batch;
    });
    Device::add(sums_of(of_pieces), pieces, call.batch, sums_of(sums) + static_cast<int64_t>(l) * call.batch,
                call.device);
  }
  return sums;
}

template <typename Device>
std::tuple<Tensors, Tensors> backward(const at::Tensor& grad_sums, at::TensorList coefficients, at::TensorList bases,
                                      at::TensorList x, at::TensorList delta, bool to_bases) {
  TORCH_CHECK(!x.empty(), "decoder_sums: at least one layer");
  const c10::DeviceGuard guard(x[0].device());
  const Call call = prepare(coefficients, bases, x, delta);
  TORCH_CHECK(grad_sums.sizes() == at::IntArrayRef({static_cast<int64_t>(call.layers()), call.batch, 3}) &&
                  grad_sums.device() == call.device,
              "decoder_sums: the gradient must be [L, b, 3]");
  const at::Tensor grads = grad_sums.to(at::kDouble).contiguous(), scratch = call.scratch(Device::kTile);
  Tensors to_c, to_basis;
  for (size_t l = 0; l < call.layers(); ++l) {
    const Layer<Device> layer(call, l, Device::kTile, scratch);
    const DecoderSums* of_layer = sums_of(grads) + static_cast<int64_t>(l) * call.batch;
    to_c.push_back(at::zeros(coefficients[l].sizes(), call.result));
    const bool nothing = call.batch * x[l].size(2) == 0;  // no tile: the gradient of the basis is 0
    if (to_bases)
      to_basis.push_back(nothing ? at::zeros(bases[l].sizes(), call.result) : at::empty(bases[l].sizes(), call.result));
    layer.for_tiles([&](const DecoderTile& tile, const at::Tensor& decoded, int64_t column) {
      Device::gradient(call.dtype, tile, of_layer, call.device);
      to_c[l].addmm_(decoded, call.wide(bases[l].narrow(1, column, tile.size)).t());
      if (!to_bases) return;
      at::Tensor out = to_basis[l].narrow(1, column, tile.size);
      at::mm_out(out, layer.coefficients().t(), decoded);
    });
  }
  return {std::move(to_c), std::move(to_basis)};
}

TORCH_LIBRARY_IMPL(r2f, CPU, library) {
  library.impl("decoder_sums", &forward<OnCpu>);
  library.impl("decoder_sums_backward", &backward<OnCpu>);
}

#ifdef R2F_WITH_CUDA
TORCH_LIBRARY_IMPL(r2f, CUDA, library) {
  library.impl("decoder_sums", &forward<OnCuda>);
  library.impl("decoder_sums_backward", &backward<OnCuda>);
}
#endif

}  // namespace
}  // namespace r2f
