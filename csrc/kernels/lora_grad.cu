// LoRA-factor gradients on CUDA. See lora_grad.h for what is computed.
//
// Two kernels, each used once, or twice when there is a B:
//
//   project:     U = X W^T (W = A, or B^T). One warp takes a few tokens; its lanes share the features and add up last.
//
//   accumulate:  S = U^T X (S = grad_B^T, or grad_A). One block takes a group and a stripe of columns; its warps share
//                the tokens.
//
// So x and delta are each read once from memory without B, twice with it (for ranks over 16, accumulate reads once per
// 16 ranks, mostly from L2). U goes through memory rather than staying in one block: it is small, and few groups still
// fill a large GPU. Each sum is taken in one fixed order: results are deterministic.
#include "kernels/lora_grad.h"
#include "kernels/lora_grad_device.h"

namespace r2f {
namespace {

using namespace tiles;  // add_rows has the barrier that R2F_PLANTED_BUG leaves out

// Which rows belong to a group. Offsets that are no such thing (the host never saw them) are cut to rows that exist.
struct Groups {
  int64_t count, rows;
  const int64_t* offsets;  // null: groups of equal size

  __device__ int64_t first_row(int64_t p) const {
    if (offsets == nullptr) return p * (rows / count);
    const int64_t row = offsets[p];
    return row < 0 ? 0 : row < rows ? row : rows;
  }
  // The last group that starts at `row` or before it (0 if none does).
  __device__ int64_t of_row(int64_t row) const {
    if (offsets == nullptr) return row / (rows / count);
    int64_t low = 0, high = count;  // the answer is in [low, high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (offsets[middle] <= row ? low : high) = middle;
    }
    return low;
  }
};

struct Shape {
  Groups groups;
  int64_t features, rank;
  bool aligned;  // every row starts at a whole pack and is made of whole packs
};

// u [rows, rank] = x w^T. w is [rank, features], or [features, rank] if kByFeature; w_stride between groups (0: one for
// all).
template <typename T, bool kByFeature>
__global__ void __launch_bounds__(kThreads)
    project(const T* x, const T* w, int64_t w_stride, Accumulation<T>* u, Shape shape) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * kProjectTokens;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kProjectTokens; first < shape.groups.rows;
       first += step) {
    const int64_t last = first + kProjectTokens < shape.groups.rows ? first + kProjectTokens : shape.groups.rows;
    int64_t next = last;
    for (int64_t row = first; row < last; row = next) {
      const T* weights = w;
      if (w_stride != 0) {  // go no further than this group
        const int64_t p = shape.groups.of_row(row),
                      end = p + 1 < shape.groups.count ? shape.groups.first_row(p + 1) : last;
        next = end <= row || end > last ? last : end;
        weights += p * w_stride;
      }
      project_rows<T, kByFeature>(x + row * shape.features, next - row, weights, u + row * shape.rank, shape.features,
                                  shape.rank, shape.aligned);
    }
  }
}

// Where results go. An element's place within a group: by rank first (grad_A) or by feature first (grad_B).
template <typename T>
struct Output {
  Accumulation<T>* grad;
  Accumulation<T>* stepped;  // null: no step
  const T* factor;           // null: zero
  int64_t factor_stride;     // between groups
  Accumulation<T> scale, lr;
};

// grad = scale u^T x for kRanks ranks (block index y) and one stripe of columns at a time.
template <typename T, int kRanks, bool kByFeature>
__global__ void __launch_bounds__(kThreads)
    accumulate(const T* x, const Accumulation<T>* u, Output<T> out, Shape shape) {
  using Acc = Accumulation<T>;
  using Shared = AccumulateShared<T, kRanks>;
  constexpr int kVec = kPack<T>, kColumns = Shared::kColumns;
  R2F_DYNAMIC_SHARED(Shared, shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t j0 = static_cast<int64_t>(blockIdx.y) * kRanks;
  const int64_t stripes = (shape.features + kColumns - 1) / kColumns;

  for (int64_t item = blockIdx.x; item < shape.groups.count * stripes; item += gridDim.x) {
    const int64_t p = item / stripes, first_column = item % stripes * kColumns, column = first_column + lane * kVec;
    const int64_t first = shape.groups.first_row(p), tokens = shape.groups.first_row(p + 1) - first;
    const T* rows = x + first * shape.features + column;
    Acc sum[kRanks][kVec] = {};

    add_rows<T, kRanks>(rows, shape.features, shape.features - column, shape.aligned, u + first * shape.rank + j0,
                        shape.rank, shape.rank - j0, tokens, shared, sum);
    add_up_warps<T, kRanks>(sum, shared);

    // Write in the order of the output, so that neighbouring threads write neighbouring places.
    const int64_t columns_left = shape.features - first_column, ranks_left = shape.rank - j0;
    const T* factor = out.factor == nullptr ? nullptr : out.factor + p * out.factor_stride;
    for (int i = thread; i < kColumns * kRanks; i += kThreads) {
      const int c = kByFeature ? i / kRanks : i % kColumns, j = kByFeature ? i % kRanks : i / kColumns;
      if (c >= columns_left || j >= ranks_left) continue;
      const int64_t place =
          kByFeature ? (first_column + c) * shape.rank + j0 + j : (j0 + j) * shape.features + first_column + c;
      const int64_t index = p * shape.rank * shape.features + place;
      const Acc grad = out.scale * shared.total[j][c];
      out.grad[index] = grad;
      if (out.stepped != nullptr)
        out.stepped[index] = (factor == nullptr ? Acc(0) : Acc(widen(factor[place]))) - out.lr * grad;
    }
  }
}

template <typename T, bool kByFeature>
void launch_project(const T* x, const T* w, int64_t w_stride, Accumulation<T>* u, Shape shape, cudaStream_t stream) {
  const int64_t items = (shape.groups.rows + kProjectTokens - 1) / kProjectTokens;
  if (items == 0 || shape.groups.count == 0) return;
  launch(project<T, kByFeature>, grid_for((items + kWarps - 1) / kWarps), kThreads, 0, stream, x, w, w_stride, u,
         shape);
}

template <typename T, int kRanks, bool kByFeature>
void launch_accumulate(const T* x, const Accumulation<T>* u, Output<T> out, Shape shape, cudaStream_t stream) {
  using Shared = AccumulateShared<T, kRanks>;
  const int64_t items = shape.groups.count * ((shape.features + Shared::kColumns - 1) / Shared::kColumns);
  if (items == 0) return;
  const dim3 grid(grid_for(items), static_cast<unsigned>((shape.rank + kRanks - 1) / kRanks));
  launch(accumulate<T, kRanks, kByFeature>, grid, kThreads, sizeof(Shared), stream, x, u, out, shape);
}

template <typename T, bool kByFeature>
void launch_accumulate(const T* x, const Accumulation<T>* u, Output<T> out, Shape shape, cudaStream_t stream) {
  if (shape.rank <= 8) return launch_accumulate<T, 8, kByFeature>(x, u, out, shape, stream);
  return launch_accumulate<T, 16, kByFeature>(x, u, out, shape, stream);
}

template <typename T>
void run(const LoraGradArgs& args, void* workspace, cudaStream_t stream) {
  using Acc = Accumulation<T>;
  const T *x = static_cast<const T*>(args.x), *delta = static_cast<const T*>(args.delta);
  const T *A = static_cast<const T*>(args.A), *B = static_cast<const T*>(args.B);
  const int64_t A_stride = args.A_per_group ? args.rank * args.d_in : 0;
  const int64_t B_stride = args.B_per_group ? args.d_out * args.rank : 0;
  const Groups groups{args.groups, args.rows, args.offsets};
  const Shape in{groups, args.d_in, args.rank, aligned<T>(x, A, args.d_in)};
  const Shape out{groups, args.d_out, args.rank, aligned<T>(delta, nullptr, args.d_out)};
  const Acc scale = static_cast<Acc>(args.scale), lr = static_cast<Acc>(args.lr);
  Acc* u = static_cast<Acc*>(workspace);

  launch_project<T, false>(x, A, A_stride, u, in, stream);
  const Output<T> grad_B{static_cast<Acc*>(args.grad_B), static_cast<Acc*>(args.B1), B, B_stride, scale, lr};
  launch_accumulate<T, true>(delta, u, grad_B, out, stream);
  if (B == nullptr) return;
  Acc* v = u + args.rows * args.rank;
  launch_project<T, true>(delta, B, B_stride, v, out, stream);
  const Output<T> grad_A{static_cast<Acc*>(args.grad_A), static_cast<Acc*>(args.A1), A, A_stride, scale, lr};
  launch_accumulate<T, false>(x, v, grad_A, in, stream);
}

}  // namespace

const char* lora_grad_cuda(DType dtype, const LoraGradArgs& args, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: run<float>(args, workspace, cuda_stream); break;
    case DType::kFloat64: run<double>(args, workspace, cuda_stream); break;
    case DType::kBFloat16: run<BFloat16>(args, workspace, cuda_stream); break;
  }
  return launch_error();
}

}  // namespace r2f
